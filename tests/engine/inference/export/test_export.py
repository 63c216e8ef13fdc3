"""`fusedacl export` and OnnxEarlyExit: the answers of PyTorch, and what cannot be exported."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fusedacl.engine import (
    EarlyExit,
    ExportConfig,
    MultiExitConfig,
    MultiExitForSequenceClassification,
    OnnxEarlyExit,
    export_model,
)
from fusedacl.engine.cli.main import main
from fusedacl.engine.config.fields import build
from fusedacl.engine.inference.export import command, onnx_files
from fusedacl.engine.inference.export.onnx_early_exit import EXPORT_FILE
from fusedacl.engine.inference.export.onnx_files import write_segments
from fusedacl.engine.inference.export.segments import split
from tiny_runs import save_model
from transformers import AlbertConfig

LABELS = ["negative", "positive"]
Capture = pytest.CaptureFixture[str]
TEXTS = ["a good dog", "the bad bird sings near the old river", "a house", "red cat eats bad bird"]


def some_texts() -> list[str]:
    """150 texts of 1 to 12 words."""
    random = np.random.default_rng(1)
    words = random.choice(" ".join(TEXTS).split(), (150, 12))
    return [" ".join(row[: random.integers(1, 13)]) for row in words]


def new_model(encoder: Path, **changes: Any) -> MultiExitForSequenceClassification:
    """Two layers with exits, whose answers differ between texts."""
    options: dict[str, Any] = {"exit_layers": [], "num_hidden_layers": 2, **changes}
    model = MultiExitForSequenceClassification.from_encoder(
        str(encoder), label_names=LABELS, **options
    ).eval()
    with torch.no_grad():
        words = model.backbone.get_input_embeddings().weight
        words.copy_(torch.randn_like(words))
    return model


@pytest.fixture(scope="module")
def exported(
    deep_bert: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A trained model with a stored policy, and its export."""
    torch.manual_seed(0)
    home = tmp_path_factory.mktemp("export")
    model = save_model(new_model(deep_bert), deep_bert, home / "model")
    data = ["--task_name", "opinions", "--data_dir", str(tiny_data), "--disable_tqdm"]
    named = ["--model_name_or_path", str(model), *data]
    assert main(["exits", *named, "--policy", "entropy", "--max_mean_layer", "1.5"]) == 0
    assert main(["export", *named, "--output_dir", str(home / "onnx"), "--measure"]) == 0
    return model, home / "onnx"


@pytest.fixture
def export(deep_bert: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`export_model` with these options, for a new model that stores no policy."""
    model = save_model(new_model(deep_bert), deep_bert, tmp_path / "model")

    def run(**options: Any) -> dict[str, Any]:
        named = {"model_name_or_path": str(model), "output_dir": str(tmp_path / "onnx")}
        config = build(ExportConfig, {"disable_tqdm": True, **named, **options})
        return export_model(config)

    return run


def test_the_same_answers_as_the_command_predict(
    exported: tuple[Path, Path], tmp_path: Path
) -> None:
    model, directory = exported
    texts = some_texts()
    # Longer than the 64 tokens that the model reads.
    texts.append(" ".join(["the good dog"] * 40))
    source, target = tmp_path / "texts.csv", tmp_path / "labels.csv"
    source.write_text("\n".join(["sentence", *texts]) + "\n")
    files = ["--input_file", str(source), "--output_file", str(target), "--disable_tqdm"]
    assert main(["predict", "--model_name_or_path", str(model), *files, "--policy", "stored"]) == 0
    with target.open(newline="") as file:
        rows = list(csv.DictReader(file))
    layers = [int(row["exit_layer"]) for row in rows]
    assert len(set(layers)) > 1
    for batch_size in (1, 7, 200):
        answers = OnnxEarlyExit(directory).predict(texts, batch_size=batch_size)
        assert answers.exit_layers.tolist() == layers
        assert answers.labels == [row["label"] for row in rows]
        wanted = [[float(row[f"probability_{name}"]) for name in LABELS] for row in rows]
        np.testing.assert_allclose(answers.probabilities, wanted, atol=2e-5)


def test_what_the_export_says_of_itself(exported: tuple[Path, Path], capsys: Capture) -> None:
    model, directory = exported
    record = json.loads((directory / EXPORT_FILE).read_text())
    assert record["policy"] == json.loads((model / "config.json").read_text())["exit_policy"]
    measured = record["measured"]
    assert measured["num_texts"] == 24 and measured["data"] == "opinions, validation"
    assert measured["num_other_answers"] == measured["num_other_layers"] == 0
    assert measured["onnx_score"] == measured["pytorch_score"]
    assert measured["largest_probability_error"] < 1e-5
    assert [speed["batch_size"] for speed in measured["speed"]] == [1, 32]
    for speed in measured["speed"]:
        assert speed["num_texts"] == 24
        assert min(speed[f"{name}_ms"] for name in ("onnx", "pytorch", "full")) > 0
    shown = {**record, "output_dir": str(directory), "has_tokenizer": True}
    assert "batch 32: " in "\n".join(command.lines_of(shown))
    # As of a tokenizer in Python, which transformers alone can run.
    words = "\n".join(command.lines_of({**shown, "has_tokenizer": False}))
    assert "graphs and early_exit.json are in" in words and "predict(texts)" not in words
    assert [segment["layer"] for segment in record["segments"]] == [1, 2]
    # Each graph holds its own weights only: the embeddings are in the first.
    first, second = ((directory / segment["file"]).stat().st_size for segment in record["segments"])
    assert second < first


def test_texts_that_left_are_not_computed_any_more(exported: tuple[Path, Path]) -> None:
    runtime = OnnxEarlyExit(exported[1])
    shapes: list[tuple[int, ...]] = []

    class Spy:
        def __init__(self, session: Any) -> None:
            self.session = session

        def run(self, names: list[str], state: dict[str, Any]) -> Any:
            shapes.append(state["attention_mask"].shape)
            return self.session.run(names, state)

    runtime._sessions = [Spy(session) for session in runtime._sessions]
    answers = runtime.predict(some_texts(), batch_size=150)
    reached = [(answers.exit_layers >= layer).sum() for layer in (1, 2)]
    assert [rows for rows, _ in shapes] == [rows for rows in reached if rows]
    assert reached[0] > reached[1] > 0


def test_neither_pytorch_nor_transformers_serves(exported: tuple[Path, Path]) -> None:
    code = f"""
import sys
from fusedacl.engine import OnnxEarlyExit

answers = OnnxEarlyExit({str(exported[1])!r}, num_threads=1).predict({TEXTS!r})
assert len(answers.labels) == 4
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_int8_with_its_score_and_without_the_guarantee(
    exported: tuple[Path, Path], tiny_data: Path, tmp_path: Path, caplog: Any, capsys: Capture
) -> None:
    model = tmp_path / "model"
    shutil.copytree(exported[0], model)
    data = ["--task_name", "opinions", "--data_dir", str(tiny_data), "--disable_tqdm"]
    named = ["--model_name_or_path", str(model), *data]
    sure = ["--max_quality_loss", "0.99", "--confidence", "0.1", "--risk", "changed_answers"]
    assert main(["exits", *named, "--policy", "fixed_layer", *sure]) == 0
    out = ["--output_dir", str(tmp_path / "int8"), "--quantize", "int8"]
    assert main(["export", *named, *out]) == 0
    assert "it is not exported with int8 weights" in caplog.text
    record = json.loads((tmp_path / "int8" / EXPORT_FILE).read_text())
    assert "guarantee" not in record["policy"]["calibration"]
    (graph,) = (tmp_path / "int8").glob("*.onnx")
    assert graph.stat().st_size < (exported[1] / "segment_1.onnx").stat().st_size
    assert record["quantize"] == "int8" and 0 <= record["measured"]["onnx_score"] <= 1
    assert 0 < record["measured"]["largest_probability_error"] < 0.2
    assert f"accuracy {record['measured']['onnx_score']:.4f}, in PyTorch" in capsys.readouterr().out
    assert len(OnnxEarlyExit(tmp_path / "int8").predict(TEXTS).labels) == 4


def test_the_guarantee_of_another_length_is_not_exported(
    exported: tuple[Path, Path], tiny_data: Path, tmp_path: Path, caplog: Any
) -> None:
    model = tmp_path / "model"
    shutil.copytree(exported[0], model)
    data = ["--task_name", "opinions", "--data_dir", str(tiny_data), "--disable_tqdm"]
    named = ["--model_name_or_path", str(model)]
    sure = ["--max_quality_loss", "0.99", "--confidence", "0.1", "--risk", "changed_answers"]
    assert main(["exits", *named, *data, "--policy", "fixed_layer", *sure]) == 0
    for length, kept in ((32, False), (64, True)):
        out = ["--output_dir", str(tmp_path / str(length)), "--max_seq_length", str(length)]
        assert main(["export", *named, *out]) == 0
        record = json.loads((tmp_path / str(length) / EXPORT_FILE).read_text())
        assert ("guarantee" in record["policy"]["calibration"]) == kept
    assert caplog.text.count("its guarantee does not hold") == 1


def test_a_mount_point_is_refused(
    export: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnx").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "onnx")
    with pytest.raises(ValueError, match="a file system is mounted.*name a directory inside it"):
        export(policy="voting:votes=2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "stores no early-exit policy"),
        ({"policy": "entropi:threshold=1"}, "Did you mean 'entropy'"),
        ({"policy": "learned:threshold=1"}, "needs the model's learned exit"),
        ({"policy": "patience:patience=9"}, "can never be reached"),
        ({"output_dir": None}, "output_dir is missing"),
        ({"format": "tflite"}, "format='tflite' is not a choice"),
        ({"policy": "voting:votes=2", "quantize": "int8"}, "its score has to be measured"),
        ({"policy": "voting:votes=2", "measure": True}, "measure times the answers to texts"),
        ({"model_name_or_path": None}, "model_name_or_path is missing"),
        ({"policy": "voting:votes=2", "max_seq_length": 99}, "99 is beyond the model, .* 64 tok"),
        ({"policy": "voting:votes=2", "data_dir": "data"}, "data_dir='data' belongs to a data set"),
        ({"policy": "voting:votes=2", "output_dir": "/proc"}, "exists and is not empty"),
    ],
)
def test_mistakes(
    export: Callable[..., dict[str, Any]], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        export(**options)
    assert not (tmp_path / "onnx").exists()


def test_a_directory_that_holds_something_is_not_touched(
    export: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty"):
        export(policy="voting:votes=2")
    assert [file.name for file in (tmp_path / "onnx").iterdir()] == ["mine.txt"]


def test_missing_packages_are_named(
    export: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"onnx, onnxscript, onnxruntime.*fusedacl\[onnx\]"):
        export(policy="voting:votes=2")


def test_encoders_that_cannot_be_split_or_recorded(
    deep_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AlbertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        vocab_size=60, embedding_size=16, max_position_embeddings=40, pad_token_id=0,
    )  # fmt: skip
    made = MultiExitForSequenceClassification(MultiExitConfig(config, exit_layers=[1, 2]))
    with pytest.raises(ValueError, match="albert encoder .* cannot be split into segments"):
        split(EarlyExit(made, "voting", votes=2))
    engine = EarlyExit(new_model(deep_bert), "voting", votes=2)
    segments = split(engine)

    def failing(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("data-dependent branch\nin line 3")

    monkeypatch.setattr(torch.onnx, "export", failing)
    with pytest.raises(ValueError, match="bert encoder cannot be exported.*data-dependent branch$"):
        write_segments(engine, segments, [tmp_path / "1.onnx"] * 2)


def write_copies(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command take the graphs of an export for those of its model."""

    def copied(engine: Any, segments: Any, files: list[Path]) -> None:
        for file in files:
            shutil.copy(directory / file.name, file)

    monkeypatch.setattr(command, "write_segments", copied)


def test_graphs_that_compute_otherwise_are_refused(
    exported: tuple[Path, Path],
    export: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def of_another_model(engine: Any, segments: Any, files: list[Path]) -> None:
        for file in files:
            shutil.copy(exported[1] / file.name, file)
        engine.model.exits[0].classifier.weight.data.add_(0.1)

    monkeypatch.setattr(command, "write_segments", of_another_model)
    with pytest.raises(
        ValueError, match="do not compute what PyTorch does .error .* cannot be exp"
    ):
        export(policy="entropy:threshold=0.1")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_graphs_that_decide_otherwise_are_refused(
    exported: tuple[Path, Path], tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_copies(exported[1], monkeypatch)
    named = {"model_name_or_path": str(exported[0]), "output_dir": str(tmp_path / "onnx")}
    data = {"task_name": "opinions", "data_dir": str(tiny_data), "disable_tqdm": True}
    with pytest.raises(ValueError, match=r"does .\d+ decisions of the policy entropy .* differ"):
        # The graphs hold the stored threshold, at which some texts leave.
        export_model(build(ExportConfig, {**named, "policy": "entropy:threshold=0"}))

    class Late(OnnxEarlyExit):
        def _run(self, state: Any, lengths: Any) -> Any:
            answers = super()._run(state, lengths)
            answers.exit_layers.fill(2)
            return answers

    monkeypatch.setattr(command, "OnnxEarlyExit", Late)
    with pytest.raises(ValueError, match=r"does .\d+ of 24 texts are answered otherwise"):
        export_model(build(ExportConfig, {**named, **data}))
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_an_empty_directory(
    exported: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_copies(exported[1], monkeypatch)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "onnx").symlink_to(tmp_path / "elsewhere")
    named = {"model_name_or_path": str(exported[0]), "output_dir": str(tmp_path / "onnx")}
    assert export_model(build(ExportConfig, named))["output_dir"] == named["output_dir"]
    assert (tmp_path / "onnx").is_symlink()
    assert len(OnnxEarlyExit(tmp_path / "onnx").predict(TEXTS).labels) == 4


def test_what_the_runtime_refuses(exported: tuple[Path, Path], tmp_path: Path) -> None:
    model, directory = exported
    with pytest.raises(ValueError, match=r"holds no early_exit.json: name the output_dir"):
        OnnxEarlyExit(model)
    runtime = OnnxEarlyExit(directory)
    ids = np.array([[2, 5, 3], [2, 3, 0]])
    for arguments, message in (
        ((ids[0],), r"input_ids has shape \[3\]"),
        ((ids[:0],), r"input_ids has shape \[0, 3\]"),
        ((ids, np.ones((2, 2))), r"attention_mask has shape \[2, 2\], input_ids \[2, 3\]"),
        ((ids, [[1, 1, 1], [0, 1, 1]]), "padding must be on the right"),
    ):
        with pytest.raises(ValueError, match=message):
            runtime(*arguments)
    for texts, options, message in (
        ("one text", {}, "must be a list of at least one text"),
        ([], {}, "must be a list of at least one text"),
        (["a"], {"batch_size": 0}, "batch_size=0"),
        (["a"], {"pairs": ["b", "c"]}, "pairs must be a list of 1 texts"),
        ([("a", "b")], {}, r"texts\[0\]=\('a', 'b'\) is no text: .* belong in pairs"),
        (["a", None], {}, r"texts\[1\]=None is no text"),
        (["a", float("nan")], {}, r"texts\[1\]=nan is no text"),
    ):
        with pytest.raises(ValueError, match=message):
            runtime.predict(texts, **options)
    pairs = OnnxEarlyExit(directory)
    pairs.record["reads_pairs"] = True
    with pytest.raises(ValueError, match=r"pairs\[1\]=3 is no text"):
        pairs.predict(["a", "b"], ["c", 3])
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in directory.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "segment_2.onnx").write_bytes(b"no graph")
    with pytest.raises(ValueError, match=r"segment_2.onnx has 8 bytes, .* export again"):
        OnnxEarlyExit(broken)
    (broken / EXPORT_FILE).write_text('{"format": 9}')
    with pytest.raises(ValueError, match="has the format 9"):
        OnnxEarlyExit(broken)
    (broken / EXPORT_FILE).write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        OnnxEarlyExit(broken)


def test_texts_need_the_package_tokenizers(
    exported: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = OnnxEarlyExit(exported[1])
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="needs tokenizers. Run: pip install tokenizers"):
        runtime.predict(TEXTS)
    assert len(runtime([[2, 5, 3]]).labels) == 1


def test_answers_that_are_none_have_no_label(exported: tuple[Path, Path]) -> None:
    runtime = OnnxEarlyExit(exported[1])
    session = runtime._sessions[0]

    class Broken:
        def run(self, names: list[str], state: dict[str, Any]) -> Any:
            logits, *others = session.run(names, state)
            # The runtime sorts texts by length, so the longest one is found by its mask.
            logits[state["attention_mask"].sum(axis=1).argmax()] = np.nan
            others[0][:] = True
            return [logits, *others]

    runtime._sessions[0] = Broken()
    words = r"answers to 1 of 4 texts \(the first has index 1\) are NaN or infinite"
    with pytest.raises(FloatingPointError, match=words):
        runtime.predict(TEXTS)
    with pytest.raises(FloatingPointError, match=r"1 of 2 texts \(the first has index 0\)"):
        runtime([[2, 5, 3], [2, 3, 0]], [[1, 1, 1], [1, 1, 0]])
