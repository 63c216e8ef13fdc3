"""Gradient angles of trained runs: compared with float64, by layer, and in files."""

from __future__ import annotations

import copy
import csv
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fusedacl.engine import MultiExitConfig, MultiExitForSequenceClassification
from fusedacl.engine.cli.main import main
from fusedacl.engine.config.commands import AngleConfig
from fusedacl.engine.config.fields import build
from fusedacl.engine.data.batching import encode, epoch_batches
from fusedacl.engine.experiments.runs import load_data, load_model, run_config
from fusedacl.engine.reports.analyses.gradient_angles import (
    ALL,
    BACKBONE,
    AngleRecords,
    choose_stage,
    contrastive_config,
    measure_angles,
    parameter_groups,
    training_batches,
)
from fusedacl.kernels import acl_cl_loss, acl_loss, supcon_loss
from tiny_runs import options_of, run
from torch.nn import functional
from transformers import DistilBertConfig, ModernBertConfig


@pytest.fixture(scope="module")
def runs(
    tiny_bert: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("runs")

    def made(name: str, **options: Any) -> Path:
        defaults = options_of(
            tiny_bert, tiny_data, home / name, max_steps=2, save_steps=0, learning_rate=1e-3,
            per_device_train_batch_size=16, temperature=0.3,
        )  # fmt: skip
        run(defaults, **options)
        return home / name

    return {
        "ce": made("ce", objective="ce"),
        "scl": made("scl", objective="scl", exit_head="linear"),
        "learned": made("learned", objective="scl", temperature_learning_rate=0.1, save_steps=1),
        "joint": made("joint", objective="acl", strategy="joint", denominator="others"),
        "two_stage": made("two_stage", objective="acl", strategy="two_stage", distill_weight=0.3),
    }


def options(**values: Any) -> AngleConfig:
    return build(AngleConfig, {"disable_tqdm": True, **values})


def first_batch(run: Path) -> tuple[MultiExitForSequenceClassification, dict[str, torch.Tensor]]:
    """The model in float64, and the first training batch, tokenised again."""
    config, trained = run_config(run), load_model(run, "cpu")
    texts = load_data(run, config, trained.record, {}, needs_train=True).splits["train"]
    order = np.random.default_rng([config.optimization.seed, 0]).permutation(len(texts))[:16]
    batch = trained.tokenizer(
        [texts.first[row] for row in order], truncation=True, max_length=16, padding=True,
        return_tensors="pt",
    )  # fmt: skip
    assert texts.labels is not None
    labels = torch.tensor([texts.labels[row] for row in order])
    return trained.model.double(), {**batch, "labels": labels}


def concatenated(loss: torch.Tensor, parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    pairs = zip(parameters, gradients, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])


@pytest.mark.parametrize(
    ("name", "layer", "contrastive"),
    [
        ("ce", 2, "scl"), ("ce", 2, "acl"), ("joint", 1, "acl"), ("joint", 2, "scl"),
        ("two_stage", 1, "acl_cl"), ("two_stage", 1, "scl"), ("two_stage", 2, "acl"),
    ],
)  # fmt: skip
def test_angle_of_one_batch_is_that_of_whole_gradients(
    runs: dict[str, Path], name: str, layer: int, contrastive: str
) -> None:
    run = runs[name]
    found = measure_angles(
        run, options(num_batches=1, exit_layer=layer, contrastive=contrastive[:3])
    )
    model, batch = first_batch(run)
    labels = batch.pop("labels")
    output = model(**batch)
    # In the tiny model, layer m has the exit m, or only the last layer has an exit.
    position = layer - 1 if len(model.exits) == 2 else 0
    logits, h = output.exit_logits[position], output.exit_embeddings[position]
    weight = model.exits[position].classifier.weight
    denominator = "others" if name == "joint" else "all"
    settings: Any = {"temperature": 0.3, "denominator": denominator, "impl": "reference"}
    if contrastive == "scl":
        auxiliary = supcon_loss(h, labels, **settings)
    elif contrastive == "acl":
        auxiliary = acl_loss(h, labels, weight, **settings)
    else:
        teacher = output.exit_embeddings[1].detach(), model.exits[1].classifier.weight.detach()
        auxiliary = acl_cl_loss(h, labels, weight, *teacher, **settings)
    parameters = list(model.exits[position].parameters())
    if not (name == "two_stage" and layer == 1):
        parameters += list(model.backbone.parameters())
    main_gradient = concatenated(functional.cross_entropy(logits, labels), parameters)
    auxiliary_gradient = concatenated(auxiliary, parameters)
    whole = found.names[0]
    wanted = [float(main_gradient.norm()), float(auxiliary_gradient.norm())]
    cosine = float(main_gradient @ auxiliary_gradient) / math.prod(wanted)
    assert found.angles(whole)[0] == pytest.approx(math.degrees(math.acos(cosine)), abs=0.01)
    assert np.sqrt(found.totals(whole)[0, 1:]) == pytest.approx(wanted, rel=1e-4)
    assert found.contrastive == {"scl": "SCL", "acl": "ACL", "acl_cl": "ACL-CL"}[contrastive]


def test_groups_add_up_and_layers_after_the_exit_have_no_part(runs: dict[str, Path]) -> None:
    joint = measure_angles(runs["joint"], options(exit_layer=1))
    assert joint.groups == ("embeddings", "layer 1", "exit 1")
    assert joint.num_batches == 4
    assert joint.totals(ALL) == pytest.approx(joint.stats.sum(axis=1))
    assert joint.totals(ALL) == pytest.approx(joint.totals(BACKBONE) + joint.totals("exit 1"))
    assert np.ptp(joint.angles(ALL)) > 0.1
    every = measure_angles(runs["joint"], options(exit_layer="all"))
    assert every.groups == ("embeddings", "layer 1", "layer 2", "exit 1", "exit 2")
    # Exits share no parameter, so each has the same angles as alone.
    assert every.angles("exit 1") == pytest.approx(joint.angles("exit 1"), abs=0.01)
    second = measure_angles(runs["two_stage"], options(exit_layer="all"))
    assert second.names == ["exit 1"]


def test_numbers_of_a_record() -> None:
    root = math.sqrt(0.75)
    stats = np.array([[[1.0, 1, 4], [0, 1, 0]], [[-root, 1, 1], [0, 0, 0]], [[0, 1, 1], [0, 2, 3]]])
    record = AngleRecords("run", "data", "SCL", "", ("layer 1", "exit 1"), stats, 0)
    assert record.angles("layer 1") == pytest.approx([60, 150, 90])
    assert record.cosines("layer 1") == pytest.approx([0.5, -root, 0])
    assert record.share_above("layer 1") == pytest.approx(1 / 3)
    assert record.share_above("layer 1", 59) == 1
    assert record.num_undefined("exit 1") == 2
    assert record.names == [ALL, "layer 1", "exit 1"]
    assert record.cosines(ALL)[0] == pytest.approx(1 / math.sqrt(2 * 4))


def test_batches_are_those_training_begins_with(runs: dict[str, Path], tmp_path: Path) -> None:
    config, trained = run_config(runs["ce"]), load_model(runs["ce"], "cpu")
    data = load_data(runs["ce"], config, trained.record, {}, needs_train=True)
    split = encode(data.splits["train"], trained.tokenizer, 16)
    epochs = [epoch_batches(split.lengths, 16, seed=5, epoch=epoch) for epoch in (0, 1)]
    wanted = [rows.tolist() for rows in (*epochs[0], *epochs[1][:2])]
    assert [rows.tolist() for rows in training_batches(split, 16, 5, 6)] == wanted
    assert len(list(training_batches(split, 16, 5, None))) == 4
    assert len(list(training_batches(split, 1, 5, None))) == 64

    sized = measure_angles(runs["ce"], options(per_device_train_batch_size=24))
    assert sized.num_batches == 3 and "batches of 24" in sized.settings
    contrasted = shutil.copytree(runs["scl"], tmp_path / "contrasted")
    text = (contrasted / "config.yaml").read_text().replace("contrastive_batch_size: null\n", "")
    (contrasted / "config.yaml").write_text(f"{text}contrastive_batch_size: 32\n")
    assert measure_angles(contrasted, options()).num_batches == 2
    found = [measure_angles(runs["ce"], options(num_batches=2, seed=seed)) for seed in (5, 5, 6)]
    first, again, other = (record.stats for record in found)
    assert np.array_equal(first, again) and not np.allclose(first, other)


def test_contrastive_loss_is_the_runs_own(runs: dict[str, Path]) -> None:
    """ACL-CL if the exit has a teacher; cross-entropy without distillation."""
    for name, asked, layer, wanted in (
        ("ce", None, None, ("scl", False)),
        ("ce", "acl", None, ("acl", False)),
        ("joint", None, "1", ("acl", False)),
        ("two_stage", None, "1", ("acl", True)),
        ("two_stage", None, "2", ("acl", False)),
        ("two_stage", "scl", "1", ("scl", False)),
    ):
        config, model = run_config(runs[name]), load_model(runs[name], "cpu").model
        stage = choose_stage(config, model, layer, runs[name])
        objective = contrastive_config(config, stage, asked).objective
        assert (objective.objective, objective.cross_layer) == wanted
        assert (objective.distill_weight, objective.temperature) == (0, 0.3)


def test_a_learned_temperature_is_that_of_the_weights(runs: dict[str, Path]) -> None:
    results = json.loads((runs["learned"] / "results.json").read_text())
    found = [
        measure_angles(runs["learned"] / name, options(num_batches=1)).settings
        for name in ("", "checkpoint-1")
    ]
    assert f"temperature {results['temperature']:g}" in found[0]
    assert found[0] != found[1] and not any("temperature 0.3," in words for words in found)


def test_layers_of_other_families_and_shortened_backbones(
    tiny_bert: Path, tiny_roberta: Path
) -> None:
    short = MultiExitForSequenceClassification.from_encoder(
        str(tiny_bert), label_names=["a", "b"], num_hidden_layers=1
    )
    assert parameter_groups(short)[0] == ["embeddings", "layer 1", "exit 1"]
    roberta = MultiExitForSequenceClassification.from_encoder(
        str(tiny_roberta), label_names=["a", "b"], exit_layers=[1, 2]
    )
    names, parameters, groups = parameter_groups(roberta)
    assert names == ["embeddings", "layer 1", "layer 2", "exit 1", "exit 2"]
    assert len(parameters) == len(groups) == len(list(roberta.parameters()))
    layers = [f"backbone.encoder.layer.{number}." for number in (0, 1)]
    places = ["backbone.embeddings.", *layers, "exits.0.", "exits.1."]
    for (name, parameter), own, group in zip(
        roberta.named_parameters(), parameters, groups, strict=True
    ):
        assert own is parameter and name.startswith(places[group])


def test_final_norms_and_other_names_of_layers() -> None:
    distilbert = DistilBertConfig(dim=32, n_layers=3, n_heads=2, hidden_dim=32, vocab_size=50)
    modern = ModernBertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1,
        sep_token_id=2,
    )  # fmt: skip
    for backbone, rest in ((distilbert, []), (modern, ["rest of backbone"])):
        model = MultiExitForSequenceClassification(MultiExitConfig(backbone, num_labels=2))
        number = backbone.num_hidden_layers
        layers = [f"layer {layer + 1}" for layer in range(number)]
        assert parameter_groups(model)[0] == ["embeddings", *layers, *rest, f"exit {number}"]


def test_a_diverged_run_is_named_with_its_batch(runs: dict[str, Path], tmp_path: Path) -> None:
    trained = load_model(runs["ce"], "cpu")
    broken = copy.deepcopy(trained.model)
    with torch.no_grad():
        broken.backbone.encoder.layer[1].output.dense.weight[0, 0] = torch.nan
    broken.save_pretrained(tmp_path)
    trained.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.yaml").write_text((runs["ce"] / "config.yaml").read_text())
    with pytest.raises(FloatingPointError, match=r"batch 1 of 4: a gradient of .* is NaN"):
        measure_angles(tmp_path, options())


def test_from_the_command_line(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A YAML file after the runs holds options.
    file = tmp_path / "options.yaml"
    file.write_text(f"output_dir: {tmp_path / 'out'}\nnum_batches: 3\n")
    command = ["angles", str(runs["ce"]), str(runs["scl"]), str(file), "--disable_tqdm"]
    assert main([*command, "--labels", "CE,CE+SCL"]) == 0
    shown = capsys.readouterr().out
    exit_rows = [line.split() for line in shown.splitlines() if line.startswith("CE+SCL ")]
    assert ["CE+SCL", "exit", "2", "3", "90.0"] in [words[:5] for words in exit_rows]
    assert "so that the angle is 90 by convention: 3 over exit 2." in shown
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {
        "angles.csv", "angles.md", "angles.png", "angles.svg", "angles.caption.txt", "index.html",
        "angles_by_layer.png", "angles_by_layer.svg", "angles_by_layer.caption.txt",
    }  # fmt: skip
    with (tmp_path / "out" / "angles.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 6
    measured = measure_angles(runs["ce"], options(num_batches=3))
    angles = [float(r["angle_degrees"]) for r in rows if r["run"] == "CE" and r["group"] == ALL]
    assert angles == pytest.approx(measured.angles(ALL), abs=1e-3)
    for row in rows:
        cosine = math.cos(math.radians(float(row["angle_degrees"])))
        assert float(row["cosine"]) == pytest.approx(cosine, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no run is named: the directories of runs come before the options"),
        (["{ce}", "{ce}"], "is named twice"),
        (["{ce}x"], "there is no such directory. Did you mean"),
        (["{joint}", "--exit_layer", "3"], "has no exit there. Choose 'all' or one of 1, 2."),
        (["{ce}", "--data_dir", "/nowhere"], "its data cannot be read again"),
        (["{ce}", "--labels", "a,b"], "1 run(s) need as many different names"),
        (["{ce}", "--contrastive", "acl_cl"], "is not a choice"),
        (["{data}"], "it is not a run of fusedacl train"),
        (["{ce}", "--num_batches", "0"], "must be at least 1"),
    ],
)
def test_mistakes(
    runs: dict[str, Path],
    tiny_data: Path,
    refuses: Callable[[list[str], str], None],
    arguments: list[str],
    message: str,
) -> None:
    places = {**runs, "data": tiny_data}
    refuses(["angles", *(word.format(**places) for word in arguments)], message)


def test_a_file_in_place_of_the_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    for place, message in (("file", "file' is a file: name a directory"), ("file/out", "no dir")):
        # Refused before the run is read.
        assert main(["angles", "run", "--output_dir", str(tmp_path / place)]) == 2
        assert message in capsys.readouterr().err
