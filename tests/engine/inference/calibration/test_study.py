"""`fusedacl exits`, from trying policies to a model that stores one, and `predict --policy`."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fusedacl.engine import MultiExitForSequenceClassification
from fusedacl.engine.cli.main import main
from fusedacl.engine.data.columns import TextSplit, content
from fusedacl.engine.inference.calibration import study as exit_study
from fusedacl.engine.inference.calibration.search import policy_grid
from fusedacl.engine.inference.calibration.timing import MeasuredSpeed, measure_speed
from fusedacl.engine.model.exit_policies import Patience
from fusedacl.engine.model.saved import load_tokenizer
from tiny_runs import save_model

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def model_dir(tiny_bert: Path, tmp_path: Path) -> Path:
    """A model whose answers differ from text to text by far more than rounding.

    Linear exits read means of the tokens, since a random encoder's first token hardly depends on
    the text; with this seed the last exit scores higher than the first.
    """
    random = np.random.default_rng(12)
    model = MultiExitForSequenceClassification.from_encoder(
        str(tiny_bert),
        label_names=["negative", "positive"],
        exit_layers=[1, 2],
        exit_head="linear",
        exit_pooling="mean",
    )
    with torch.no_grad():
        for weight in [model.backbone.get_input_embeddings().weight, *model.exits.parameters()]:
            weight.copy_(torch.from_numpy(random.standard_normal(weight.shape)))
    return save_model(model, tiny_bert, tmp_path / "model")


@pytest.fixture
def run(model_dir: Path, tiny_data: Path) -> Run:
    """The command with these options; for `model_dir` unless another directory is named."""
    source = ["--task_name", "opinions", "--data_dir", str(tiny_data), "--disable_tqdm"]

    def run(*options: str, model: Path = model_dir) -> int:
        return main(["exits", "--model_name_or_path", str(model), *source, *options])

    return run


def config_of(model_dir: Path) -> dict[str, Any]:
    return json.loads((model_dir / "config.json").read_text())


def test_sweep_store_and_serve(run: Run, model_dir: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "report"
    target = ["--policy", "entropy", "--max_mean_layer", "1.7", "--metric", "accuracy"]
    assert run(*target, "--output_dir", str(out), "--measure") == 0
    printed = capsys.readouterr().out
    assert "full model: accuracy" in printed and "entropy is stored" in printed
    assert "on 24 texts (opinions, validation), float32, at most 64 tokens" in printed
    assert "cross-fitted: chosen on one half of them, scored on the other" in printed
    written = {path.name for path in out.iterdir()}
    assert written == {"exits.json", "exits.csv", "exits.md", "exits.png", "exits.svg"}
    results = json.loads((out / "exits.json").read_text())
    assert [speed["batch_size"] for speed in results["policies"]["voting"]["measured"]] == [1, 32]
    with (out / "exits.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    for name, found in results["policies"].items():
        rows = [row for row in table if row["policy"] == name]
        assert {row["area_under_curve"] for row in rows} == {f"{found['area_under_curve']:.4f}"}
        timed = [row for row in rows if row["speedup_batch_1"] and row["speedup_batch_32"]]
        assert len(timed) == len(found["timed"]) <= exit_study.MAX_TIMED_SETTINGS
        layers = [f"{row['mean_layer']:.3f}" for row in found["timed"]]
        assert sorted(row["mean_layer"] for row in timed) == sorted(layers)
        if "parameters" in found:
            at = [row["parameters"] for row in found["timed"]].index(found["parameters"])
            assert found["timed"][at]["measured"] == found["measured"]
    assert len(results["policies"]["entropy"]["timed"]) > 1
    assert f"Other settings' times are in {out / 'exits.csv'}" in printed
    assert results["complete"] and results["command"].startswith("fusedacl exits --model_name")
    model = MultiExitForSequenceClassification.from_pretrained(model_dir)
    assert model.config.exit_policy["name"] == "entropy"
    facts = model.config.exit_policy["calibration"]
    assert facts["mean_layer"] <= 1.7
    assert (facts["dtype"], facts["max_seq_length"]) == ("float32", 64)
    assert facts["cross_fitted"].keys() == {"score", "mean_layer", "flops_share", "num_folds"}
    measured = results["policies"]["entropy"]["measured"]
    card = (model_dir / "README.md").read_text()
    for speed in measured:
        assert f"| {speed['speedup']:.2f}x" in card
    assert f"| {facts['score']:.4f} | {facts['cross_fitted']['score']:.4f} |" in card
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
    run: Run, model_dir: Path
) -> None:
    """It is not among the saved weights, so the configuration must not name it."""
    both = ["--policies", "entropy,learned", "--policy", "entropy", "--max_mean_layer", "2"]
    assert run(*both) == 0
    assert not config_of(model_dir).get("learned_exit", False)
    assert config_of(model_dir)["exit_policy"]["name"] == "entropy"


def test_ctrl_c_keeps_what_is_done(
    run: Run, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The timing of the second policy is interrupted; the stored policy was timed first."""
    out = tmp_path / "report"
    timed, seen = [], []

    def interrupted(*arguments: Any, **options: Any) -> list[MeasuredSpeed]:
        # The file on disk when the timing of a policy begins.
        seen.append(json.loads((out / "exits.json").read_text()))
        if len(timed) == 3:
            raise KeyboardInterrupt
        timed.append(arguments[2][0].name)
        return measure_speed(*arguments, **options)

    monkeypatch.setattr(exit_study, "measure_speed", interrupted)
    options = ["--policy", "voting", "--max_quality_loss", "1", "--policies", "entropy,fixed_layer"]
    options += ["--measure", "--measured_samples", "4", "--output_dir", str(out)]
    assert run(*options) == 130
    assert timed == ["voting", "voting", "entropy"]
    assert set(seen[0]["policies"]) == {"entropy", "fixed_layer", "voting"}
    assert "measured" not in seen[0]["policies"]["voting"]
    assert len(seen[2]["policies"]["voting"]["measured"]) == 2
    printed = capsys.readouterr().out
    words = f"Interrupted: 3 of 3 policies were tried, 1 of 3 timed. Results so far are in {out}."
    assert words in printed and "voting is stored with the model" in printed
    results = json.loads((out / "exits.json").read_text())
    assert not results["complete"]
    assert "measured" not in results["policies"]["entropy"]
    assert [speed["num_texts"] for speed in results["policies"]["voting"]["measured"]] == [4, 4]
    assert {path.name for path in out.iterdir()} >= {"exits.csv", "exits.md", "exits.png"}


def test_times_that_nothing_would_show_are_not_taken(
    run: Run, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[Any] = []

    def measured(*arguments: Any, **options: Any) -> list[MeasuredSpeed]:
        timed.append(arguments[2])
        return measure_speed(*arguments, **options)

    monkeypatch.setattr(exit_study, "measure_speed", measured)
    # With patience, no text leaves at the first of two exits: no setting reaches this target.
    monkeypatch.setattr(Patience, "least_exits", 2)
    options = ["--policies", "entropy,patience", "--max_mean_layer", "1", "--measure"]
    assert run(*options, "--measured_samples", "4") == 0
    assert [[policy.name for policy in policies] for policies in timed] == [["entropy"]] * 2
    printed = capsys.readouterr().out
    assert "target out of reach" in printed and "exits.csv" not in printed


def test_ctrl_c_before_anything_is_stored(
    run: Run, model_dir: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "voting":
            raise KeyboardInterrupt
        return policy_grid(name, *arguments, **options)

    monkeypatch.setattr(exit_study, "policy_grid", interrupted)
    options = ["--policies", "entropy,voting", "--policy", "voting"]
    assert run(*options, "--output_dir", str(tmp_path / "out")) == 130
    printed = capsys.readouterr().out
    assert "Interrupted: 1 of 2 policies were tried. Results" in printed
    assert "is stored" not in printed
    assert list(json.loads((tmp_path / "out/exits.json").read_text())["policies"]) == ["entropy"]
    assert config_of(model_dir).get("exit_policy") is None


def test_the_learned_exit_survives(run: Run, model_dir: Path, capsys: Capture) -> None:
    before = MultiExitForSequenceClassification.from_pretrained(model_dir)
    assert before.learned_exit is None
    options = ["--policies", "learned", "--policy", "learned", "--max_quality_loss", "1"]
    assert run(*options) == 0
    assert "its layer was fitted on these texts (opinions, val" in capsys.readouterr().out
    model = MultiExitForSequenceClassification.from_pretrained(model_dir)
    assert model.learned_exit is not None
    facts = model.config.exit_policy["calibration"]
    assert facts["learned_exit"] == {"fitted_on": "opinions, validation", "num_folds": 5}
    assert model.learned_exit.weight.abs().sum() > 0
    for name, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    inputs = {"input_ids": torch.tensor([[2, 5, 6, 3]])}
    assert model.early_exit(inputs).exit_layers.tolist() == [1]
    # Storing another policy later keeps it.
    assert run("--policy", "voting", "--max_quality_loss", "1") == 0
    again = MultiExitForSequenceClassification.from_pretrained(model_dir)
    assert again.config.exit_policy["name"] == "voting"
    assert torch.equal(again.learned_exit.weight, model.learned_exit.weight)


def test_a_guarantee_is_stored_with_the_policy(
    run: Run, model_dir: Path, tmp_path: Path, capsys: Capture
) -> None:
    model = MultiExitForSequenceClassification.from_pretrained(model_dir)
    # The untrained exits hardly ever agree.
    model.exits[0].load_state_dict(model.exits[1].state_dict())
    model.save_pretrained(model_dir)
    out = tmp_path / "report"
    options = ["--policies", "voting", "--policy", "entropy", "--metric", "accuracy"]
    options += ["--max_quality_loss", "0.7", "--confidence", "0.6"]
    assert run(*options, "--output_dir", str(out)) == 0
    printed = capsys.readouterr().out
    assert "with confidence 0.6 it is at most 0.7 on new texts" in printed
    facts = config_of(model_dir)["exit_policy"]["calibration"]
    found = facts["guarantee"]
    assert (found["limit"], found["confidence"], found["risk"]) == (0.7, 0.6, "lost_answers")
    assert found["p_value"] <= 0.4 and found["num_texts"] == round(24 * facts["full_score"])
    assert facts["cross_fitted"] is None
    assert f"{found['num_lost']} of {found['num_texts']}" in printed
    stored = json.loads((out / "exits.json").read_text())["policies"]["entropy"]
    assert stored["calibration"]["guarantee"] == found
    card = (model_dir / "README.md").read_text()
    assert f"Lost in the test: {found['num_lost']} of {found['num_texts']} texts" in card
    # Without a guarantee, the next calibration leaves no trace of it.
    assert run("--policy", "entropy", "--max_quality_loss", "0.7") == 0
    assert "guarantee" not in config_of(model_dir)["exit_policy"]["calibration"]
    assert "Lost in the test" not in (model_dir / "README.md").read_text()


def test_the_guarantee_of_a_learned_exit_is_from_texts_it_was_not_fitted_on(
    run: Run, model_dir: Path, capsys: Capture
) -> None:
    options = ["--policies", "learned,entropy", "--policy", "learned", "--max_quality_loss", "0.9"]
    assert run(*options, "--confidence", "0.6", "--risk", "changed_answers") == 0
    printed = capsys.readouterr().out
    words = "fitted on half of these texts (opinions, validation); guarantee and scores are from"
    assert words in printed
    facts = config_of(model_dir)["exit_policy"]["calibration"]
    assert facts["learned_exit"] == {"fitted_on": "opinions, validation", "num_texts": 12}
    assert facts["num_samples"] == facts["guarantee"]["num_texts"] == 12


def test_too_few_texts_for_the_half_that_tests_a_learned_exit(run: Run, capsys: Capture) -> None:
    options = ["--policies", "learned", "--policy", "learned", "--max_quality_loss", "0.1"]
    assert run(*options, "--confidence", "0.8", "--risk", "changed_answers") == 2
    assert "12 are given. Only half of the texts given are tested" in capsys.readouterr().err


def test_texts_that_the_model_was_trained_on(
    run: Run, model_dir: Path, tiny_data: Path, capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(model_dir)
    rows = (tiny_data / "opinions" / "validation.jsonl").read_text().splitlines()
    sentences = [json.loads(row)["sentence"] for row in rows]
    same = content(TextSplit(sentences, None, None))["texts"]
    some = content(TextSplit([*sentences[:18][::-1], "a text of its own"], None, None))
    record = {"labels_as": "names", "text_columns": ["sentence"], "label_column": "label"}
    promise = ["--metric", "accuracy", "--max_quality_loss", "0.7", "--confidence", "0.6"]
    # A record of an earlier version, and that of a training file with a part of these texts.
    for splits, which in (
        ({"train": {"rows": 24, "texts": same}}, "these texts"),
        ({"train": some}, "about 74% of these texts"),
    ):
        config["data_record"] = {**record, "splits": splits}
        (model_dir / "config.json").write_text(json.dumps(config))
        assert run("--policies", "entropy", *promise) == 2
        message = f"opinions, validation: the model was trained on {which}, and a guarantee needs"
        assert message in capsys.readouterr().err
        caplog.clear()
        assert run("--policies", "fixed_layer", "--max_mean_layer", "1") == 0
        assert "will look better than they are on others" in caplog.text
    # A checkpoint that was chosen on these texts has no guarantee from them, and no such warning.
    config["data_record"] = {**record, "splits": {"validation": some}, "chosen_on": "validation"}
    (model_dir / "config.json").write_text(json.dumps(config))
    assert run("--policies", "entropy", *promise) == 2
    assert "the checkpoint was chosen on these texts (load_best" in capsys.readouterr().err
    caplog.clear()
    assert run("--policies", "fixed_layer", "--max_mean_layer", "1") == 0
    assert "look better" not in caplog.text


def test_a_full_disk_does_not_cost_the_model(
    run: Run, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.name: file.read_bytes() for file in model_dir.iterdir()}

    def torn(self: Any, directory: str, **options: Any) -> None:
        (Path(directory) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(MultiExitForSequenceClassification, "save_pretrained", torn)
    options = ["--policies", "learned", "--policy", "learned", "--max_quality_loss", "1"]
    assert run(*options) == 1
    assert {file.name: file.read_bytes() for file in model_dir.iterdir()} == before


def test_a_model_that_cannot_be_changed_is_refused_before_any_work(
    run: Run, model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(exit_study, "load_labelled", None)
    assert run("--policy", "entropy") == 2
    assert "model_name_or_path" in (printed := capsys.readouterr().err)
    assert "does not permit it" in printed


def test_an_exit_that_learns_nothing_leaves_the_other_policies(
    run: Run, model_dir: Path, caplog: pytest.LogCaptureFixture, capsys: Capture
) -> None:
    model = MultiExitForSequenceClassification.from_pretrained(model_dir)
    model.exits[0].load_state_dict(model.exits[1].state_dict())
    model.save_pretrained(model_dir)
    options = ["--max_eval_samples", "4", "--max_quality_loss", "1", "--policy"]
    assert run(*options, "entropy", "--policies", "learned,entropy") == 0
    assert "learned: left out. 4 texts cannot be cross-fitted" in caplog.text
    assert config_of(model_dir)["exit_policy"]["name"] == "entropy"
    assert run(*options, "learned", "--policies", "entropy") == 2
    assert "4 texts cannot be cross-fitted" in capsys.readouterr().err


def test_a_guarantee_is_lost_with_other_weights(
    run: Run, model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    promise = ["--risk", "changed_answers", "--max_quality_loss", "0.9", "--confidence", "0.6"]
    assert run("--policy", "learned", "--policies", "learned", *promise) == 0
    texts = tmp_path / "texts.csv"
    texts.write_text("sentence\na good dog\nthe bad bird sings near the river\na house\n")
    files = ["--input_file", str(texts), "--output_file", str(tmp_path / "labels.csv")]
    model = ["--model_name_or_path", str(model_dir), "--disable_tqdm", "--policy", "stored"]
    caplog.clear()
    # The learned exit, which was added since the test, is none of the weights.
    assert main(["predict", *model, *files]) == 0 and "other weights" not in caplog.text
    trained = MultiExitForSequenceClassification.from_pretrained(model_dir)
    with torch.no_grad():
        trained.exits[0].get_parameter("classifier.bias").add_(1e-3)
    other = save_model(trained, model_dir, tmp_path / "other")
    assert main(["predict", *model, "--model_name_or_path", str(other), *files]) == 0
    assert "with other weights, so its guarantee does not hold" in caplog.text


def test_settings_that_save_nothing_are_warned_of(
    run: Run, model_dir: Path, tiny_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The labels are what the last exit says; the first exit is sure of the contrary."""
    model = MultiExitForSequenceClassification.from_pretrained(model_dir)
    with torch.no_grad():
        for weight, other in zip(
            model.exits[0].parameters(), model.exits[1].parameters(), strict=True
        ):
            weight.copy_(-9 * other)
    model.save_pretrained(model_dir)

    task = tmp_path / "data" / "opinions"
    shutil.copytree(tiny_data / "opinions", task)
    validation = task / "validation.jsonl"
    rows = [json.loads(line) for line in validation.read_text().splitlines()]
    tokens = load_tokenizer(str(model_dir))(
        [row["sentence"] for row in rows], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        answers = model.eval()(**tokens).logits.argmax(-1).tolist()
    for row, answer in zip(rows, answers, strict=True):
        row["label"] = model.config.id2label[answer]
    validation.write_text("".join(json.dumps(row) + "\n" for row in rows))

    options = ["--policies", "voting", "--max_quality_loss", "0"]
    assert run(*options, "--data_dir", str(task.parent)) == 0
    assert "voting: no setting within the target saves operations; voting" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output_dir", __file__], "test_study.py' is a file: name a directory"),
        (["--confidence", "0"], "confidence=0.0 is out of range"),
        (["--confidence", "95"], "confidence=95.0 is out of range"),
        (["--confidence", "0.9", "--max_mean_layer", "1"], "confidence bounds max_quality_loss"),
        (["--confidence", "0.9", "--metric", "macro_f1"], "not of macro_f1"),
        (["--confidence", "0.95"], "needs at least 299 texts, even if none is lost: 24 are given"),
        (["--confidence", "0.9", "--max_quality_loss", "0"], "no number of texts can show"),
        (["--risk", "changed_answers"], "risk=changed_answers belongs to confidence"),
        (["--policies", "entropi"], "Did you mean 'entropy'"),
        (["--policies", ","], "policies is empty"),
        (["--max_mean_layer", "1", "--max_flops_share", "0.5"], "give exactly one of"),
        (["--metric", "acuracy"], "Did you mean 'accuracy'"),
        (["--policy", "voting", "--max_flops_share", "0.01"], "no setting is as fast"),
        (["--policy", "patience"], "patience: with 2 exits no text leaves early: it needs at"),
        (["--confidence", "0.9", "--max_eval_samples", "20"], "takes the first texts, which may"),
        (["--measured_samples", "50"], "measured_samples=50 belongs to measure"),
        (["--measure", "--measured_samples", "0"], "measured_samples=0 is out of range"),
        (["--max_eval_samples", "4", "--policies", "learned"], "4 texts cannot be cross-fitted"),
    ],
)
def test_mistakes(run: Run, capsys: Capture, options: list[str], message: str) -> None:
    assert run(*options) == 2
    assert message in capsys.readouterr().err


def test_models_that_have_nothing_to_sweep(
    run: Run, tiny_bert: Path, tmp_path: Path, capsys: Capture
) -> None:
    model = MultiExitForSequenceClassification.from_encoder(
        str(tiny_bert), label_names=["negative", "positive"]
    )
    assert run(model=save_model(model, tiny_bert, tmp_path / "single")) == 2
    assert "has one exit, on layer 2: nothing can leave early" in capsys.readouterr().err
    assert run(model=tiny_bert) == 2
    assert "is a bert model, not one that `fusedacl train` has fine" in capsys.readouterr().err


def test_a_model_that_diverged(run: Run, model_dir: Path, capsys: Capture) -> None:
    model = MultiExitForSequenceClassification.from_pretrained(model_dir)
    with torch.no_grad():
        model.exits[0].classifier.weight.fill_(float("nan"))
    model.save_pretrained(model_dir)
    assert run("--policy", "entropy") == 1
    assert "layer 1 has NaN or infinite logits for 24 of 24 texts" in capsys.readouterr().err
    assert config_of(model_dir).get("exit_policy") is None
