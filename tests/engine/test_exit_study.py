"""`fusedacl exits` from the sweep to a model that keeps its policy, and `predict --policy`."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from fusedacl.engine import MultiExitForSequenceClassification
from fusedacl.engine.cli import main
from fusedacl.engine.loading import load_tokenizer


@pytest.fixture
def model_dir(tiny_bert: Path, tmp_path: Path) -> Path:
    model = MultiExitForSequenceClassification.from_encoder(
        str(tiny_bert),
        label_names=["negative", "positive"],
        exit_layers=[1, 2],
        exit_head="linear",
    )
    with torch.no_grad():
        words = model.backbone.get_input_embeddings().weight
        words.copy_(torch.randn_like(words))
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(str(tiny_bert)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(model_dir: Path, tiny_data: Path, *options: str) -> int:
    source = ["--task_name", "opinions", "--data_dir", str(tiny_data), "--disable_tqdm"]
    return main(["exits", "--model_name_or_path", str(model_dir), *source, *options])


def test_sweep_store_and_serve(
    model_dir: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    target = ["--policy", "entropy", "--max_mean_layer", "1.7", "--metric", "accuracy"]
    assert run(model_dir, tiny_data, *target, "--output_dir", str(out), "--measure") == 0
    printed = capsys.readouterr().out
    assert "full model: accuracy" in printed and "entropy is stored" in printed
    written = {path.name for path in out.iterdir()}
    assert written == {"exits.json", "exits.csv", "exits.md", "exits.png", "exits.svg"}
    results = json.loads((out / "exits.json").read_text())
    assert [speed["batch_size"] for speed in results["policies"]["voting"]["measured"]] == [1, 32]
    model = MultiExitForSequenceClassification.from_pretrained(model_dir)
    assert model.config.exit_policy["name"] == "entropy"
    assert model.config.exit_policy["calibration"]["mean_layer"] <= 1.7
    texts = tmp_path / "texts.csv"
    texts.write_text("sentence\na good dog\nthe bad bird sings near the river\na house\n")
    files = ["--input_file", str(texts), "--output_file", str(tmp_path / "labels.csv")]
    command = ["predict", "--model_name_or_path", str(model_dir), *files, "--disable_tqdm"]
    assert main([*command, "--policy", "stored", "--repack"]) == 0
    with (tmp_path / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    tokens = load_tokenizer(str(model_dir))(
        ["a good dog", "the bad bird sings near the river", "a house"],
        padding=True,
        return_tensors="pt",
    )
    expected = model.early_exit(tokens)
    assert [int(row["exit_layer"]) for row in rows] == expected.exit_layers.tolist()
    names = model.config.id2label
    assert [row["label"] for row in rows] == [names[i] for i in expected.predictions.tolist()]
    assert main([*command, "--policy", "fixed_layer:layer=1"]) == 0
    assert main([*command, "--policy", "fixed_layer:layer=3"]) == 2
    assert "layer=3 carries no exit" in capsys.readouterr().err
    assert main([*command, "--repack"]) == 2


def test_a_learned_exit_of_the_sweep_is_not_promised_to_those_who_load(
    model_dir: Path, tiny_data: Path
) -> None:
    """It is not among the weights that stay, so the configuration may not name it."""
    both = ["--policies", "entropy,learned", "--policy", "entropy", "--max_mean_layer", "2"]
    assert run(model_dir, tiny_data, *both, "--learned_exit_samples", "40") == 0
    config = json.loads((model_dir / "config.json").read_text())
    assert not config.get("learned_exit", False)
    assert config["exit_policy"]["name"] == "entropy"


def test_the_learned_exit_survives(model_dir: Path, tiny_data: Path) -> None:
    before = MultiExitForSequenceClassification.from_pretrained(model_dir)
    assert before.learned_exit is None
    options = ["--policies", "learned", "--policy", "learned", "--max_quality_loss", "1"]
    assert run(model_dir, tiny_data, *options) == 0
    model = MultiExitForSequenceClassification.from_pretrained(model_dir)
    assert model.learned_exit is not None
    assert model.learned_exit.weight.abs().sum() > 0
    for name, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    inputs = {"input_ids": torch.tensor([[2, 5, 6, 3]])}
    assert model.early_exit(inputs).exit_layers.tolist() == [1]
    # Another policy, stored later, leaves it where it is.
    assert run(model_dir, tiny_data, "--policy", "patience", "--max_quality_loss", "1") == 0
    again = MultiExitForSequenceClassification.from_pretrained(model_dir)
    assert again.config.exit_policy["name"] == "patience"
    assert torch.equal(again.learned_exit.weight, model.learned_exit.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policies", "entropi"], "Did you mean 'entropy'"),
        (["--policies", ","], "policies is empty"),
        (["--max_mean_layer", "1", "--max_flops_share", "0.5"], "give exactly one of"),
        (["--metric", "acuracy"], "Did you mean 'accuracy'"),
        (["--policy", "patience", "--max_mean_layer", "1"], "no setting is as fast"),
    ],
)
def test_mistakes(
    model_dir: Path,
    tiny_data: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert run(model_dir, tiny_data, *options) == 2
    assert message in capsys.readouterr().err


def test_a_model_with_one_exit(
    tiny_bert: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = MultiExitForSequenceClassification.from_encoder(
        str(tiny_bert), label_names=["negative", "positive"]
    )
    model.save_pretrained(tmp_path)
    load_tokenizer(str(tiny_bert)).save_pretrained(tmp_path)
    assert run(tmp_path, tiny_data) == 2
    assert "has one exit, on layer 2: nothing can leave early" in capsys.readouterr().err
