"""Representations and label embeddings: the numbers, t-SNE, and the files of `fusedacl tsne`."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fusedacl.engine import MultiExitForSequenceClassification, TrainingConfig
from fusedacl.engine.cli.main import main
from fusedacl.engine.config.commands import TSNEConfig
from fusedacl.engine.config.fields import build, write_yaml
from fusedacl.engine.experiments.runs import run_config
from fusedacl.engine.model.saved import load_tokenizer
from fusedacl.engine.reports.analyses.representation_report import check_perplexity, embed
from fusedacl.engine.reports.analyses.representations import (
    Representations,
    choose_layers,
    measure_alignment,
    read_representations,
)
from torch.nn import functional


def make_run(
    tiny_bert: Path, tiny_data: Path, directory: Path, head: str, layers: list[int]
) -> Path:
    """The files of a run, without training, of a model with distinct word embeddings."""
    torch.manual_seed(1)
    model = MultiExitForSequenceClassification.from_encoder(
        str(tiny_bert), label_names=["negative", "positive"], exit_layers=layers, exit_head=head
    )
    with torch.no_grad():
        words = model.backbone.get_input_embeddings().weight
        words.copy_(torch.randn_like(words))
    model.save_pretrained(directory)
    load_tokenizer(str(tiny_bert)).save_pretrained(directory)
    config = TrainingConfig.create(
        task_name="opinions", data_dir=str(tiny_data), exit_head=head, strategy="joint",
        model_name_or_path=str(tiny_bert), output_dir=str(directory), max_eval_samples=5,
    )  # fmt: skip
    write_yaml(config, directory / "config.yaml")
    return directory


@pytest.fixture(scope="module")
def runs(
    tiny_bert: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("runs")
    kinds: dict[str, Any] = {"mha": ("mha", [1, 2]), "linear": ("linear", [1, 2])}
    kinds["last"] = "mha", [2]
    return {name: make_run(tiny_bert, tiny_data, home / name, *kinds[name]) for name in kinds}


def options(**values: Any) -> TSNEConfig:
    return build(TSNEConfig, {"disable_tqdm": True, **values})


@pytest.mark.parametrize("head", ["mha", "linear"])
def test_representations_are_what_the_classifier_reads(
    runs: dict[str, Path], tiny_data: Path, head: str
) -> None:
    run = runs[head]
    config = options(max_samples=10, seed=3, per_device_eval_batch_size=4)
    (one,) = read_representations(run, run_config(run), "name", config, [2])
    lines = (tiny_data / "opinions" / "validation.jsonl").read_text().splitlines()
    chosen = np.sort(np.random.default_rng(3).choice(24, 10, replace=False))
    texts = [json.loads(lines[row]) for row in chosen]
    names = ["negative", "positive"]
    assert one.classes.tolist() == [names.index(text["label"]) for text in texts]
    assert (one.layer, one.data, one.class_names) == (2, "opinions, validation", names)
    model = MultiExitForSequenceClassification.from_pretrained(run).eval()
    tokens = load_tokenizer(str(run))(
        [text["sentence"] for text in texts], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        output = model(**tokens)
    logits, h = output.exit_logits[1], output.exit_embeddings[1]
    assert one.samples == pytest.approx(functional.normalize(h, dim=-1).numpy(), abs=1e-5)
    # Scaled to their lengths, and with the bias of a linear exit, they give the logits.
    weight = model.exits[1].classifier.weight.detach()
    bias = 0 if model.exits[1].classifier.bias is None else model.exits[1].classifier.bias.detach()
    cosines = torch.from_numpy(one.samples @ one.label_embeddings.T)
    remade = cosines * h.norm(dim=1, keepdim=True) * weight.norm(dim=1) + bias
    assert torch.allclose(remade, logits, atol=1e-4)


def made(
    samples: list[list[float]], label_embeddings: list[list[float]], classes: list[int]
) -> Any:
    return Representations(
        "run", "data", 1, np.array(samples), np.array(label_embeddings), np.array(classes),
        [str(index) for index in range(len(label_embeddings))],
    )  # fmt: skip


def test_alignment_by_hand() -> None:
    labels = [[1.0, 0], [0, 1.0], [-1.0, 0]]
    found = measure_alignment(made([[1, 0], [0.6, 0.8], [0, 1], [0, 1]], labels, [0, 0, 1, 1]))
    assert found.own == pytest.approx((1 + 0.6 + 1 + 1) / 4)
    assert found.nearest_other == pytest.approx((0 + 0.8 + 0 + 0) / 4)
    assert found.margin == pytest.approx((1 - 0.2 + 1 + 1) / 4)
    assert found.nearest_is_own == 0.75
    # Cosine distances of the first two: 0.4 to each other, then 1 and 0.2 to the others.
    silhouettes = [(1 - 0.4) / 1, (0.2 - 0.4) / 0.4, 1, 1]
    assert found.silhouette == pytest.approx(np.mean(silhouettes))
    assert measure_alignment(made([[1, 0], [0, 1]], labels, [1, 1])).silhouette is None
    assert measure_alignment(made([[1, 0], [0, 1]], labels, [0, 1])).silhouette is None


def test_layers_to_show() -> None:
    six = [1, 2, 3, 4, 5, 6]
    assert choose_layers(None, [six]) == [1, 4, 6]
    assert choose_layers(None, [six, [6]]) == [6]
    assert choose_layers("all", [six, [2, 4, 6]]) == [2, 4, 6]
    assert choose_layers("6,1", [six]) == [1, 6]
    with pytest.raises(ValueError, match="no exit layer in common"):
        choose_layers(None, [six, [12]])


def test_tsne_finds_groups_and_repeats_itself() -> None:
    random = np.random.default_rng(0)
    centres = np.eye(3, 8)
    classes = np.repeat(range(3), 20)
    samples = centres[classes] + 0.05 * random.standard_normal((60, 8))
    samples /= np.linalg.norm(samples, axis=1, keepdims=True)
    one = Representations("run", "data", 1, samples, centres, classes, ["a", "b", "c"])
    where = embed(one, perplexity=10, seed=4)
    assert where.shape == (63, 2)
    assert np.array_equal(where, embed(one, perplexity=10, seed=4))
    distances = np.linalg.norm(where[:60, None] - where[None, 60:], axis=-1)
    assert (distances.argmin(axis=1) == classes).all()


def test_perplexity_needs_points() -> None:
    check_perplexity(30, 89, 2)
    with pytest.raises(ValueError, match=r"needs 91 points.*88 texts.*largest that works is 29"):
        check_perplexity(30, 88, 2)
    with pytest.raises(ValueError, match="too few for any"):
        check_perplexity(1, 1, 2)


def test_from_the_command_line(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["tsne", str(runs["mha"]), str(runs["linear"]), "--perplexity", "6"]
    assert main([*command, "--output_dir", str(out), "--disable_tqdm"]) == 0
    shown = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "tsne.png", "tsne.svg", "tsne.csv", "tsne.caption.txt", "representations.csv",
        "representations.md", "index.html",
    }  # fmt: skip
    with (out / "tsne.csv").open(newline="") as file:
        points = list(csv.DictReader(file))
    assert len(points) == 2 * 2 * (24 + 2)
    assert sum(row["what"] == "label embedding" for row in points) == 8
    with (out / "representations.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    runs_and_exits = itertools.product(("JT-MHA ACL", "JT-linear ACL"), "12")
    assert [(row["run"], row["exit"]) for row in rows] == list(runs_and_exits)
    (exit_2,) = read_representations(runs["mha"], run_config(runs["mha"]), "", options(), [2])
    assert float(rows[1]["margin"]) == pytest.approx(measure_alignment(exit_2).margin, abs=1e-4)
    assert rows[1]["margin"] in shown and rows[1]["margin"] in (out / "index.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{last}", "--exit_layers", "1"], "has no exit on layer 1; it has 2."),
        (["{mha}", "{last}", "--exit_layers", "1,2"], "last' has no exit on layer 1"),
        (["{mha}", "--exit_layers", "1;2"], "is neither 'all' nor a list"),
        (["{mha}"], "The largest that works is 8"),
        (["{mha}", "--perplexity", "0"], "must be more than 0"),
    ],
)
def test_mistakes(
    runs: dict[str, Path],
    refuses: Callable[[list[str], str], None],
    arguments: list[str],
    message: str,
) -> None:
    refuses(["tsne", *(word.format(**runs) for word in arguments)], message)


def test_what_a_machine_or_a_model_lacks(
    runs: dict[str, Path],
    tiny_bert: Path,
    tiny_data: Path,
    tmp_path: Path,
    refuses: Callable[[list[str], str], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "sklearn.manifold", None)
        refuses(["tsne", str(runs["mha"]), "--perplexity", "6"], "pip install scikit-learn")
    out = ["--output_dir", str(tmp_path / "out"), "--disable_tqdm", "--perplexity", "6"]
    diverged = make_run(tiny_bert, tiny_data, tmp_path / "diverged", "mha", [1, 2])
    model = MultiExitForSequenceClassification.from_pretrained(diverged)
    with torch.no_grad():
        model.exits[0].classifier.weight[0, 0] = torch.nan
    model.save_pretrained(diverged)
    assert main(["tsne", str(diverged), *out]) == 1
    assert "exit 1: 1 of 2 label embeddings are NaN" in capsys.readouterr().err


def test_a_file_in_place_of_the_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    for place, message in (("file", "file' is a file: name a directory"), ("file/out", "no dir")):
        # Refused before the run is read.
        assert main(["tsne", "run", "--output_dir", str(tmp_path / place)]) == 2
        assert message in capsys.readouterr().err
