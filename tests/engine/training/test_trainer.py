"""Whole runs on tiny models: what they learn and leave, how they stop and go on."""

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fusedacl.engine.backends import loss_scaling
from fusedacl.engine.reports.run_figures import draw_angle_histogram
from fusedacl.engine.runtime.signals import Interrupted
from fusedacl.engine.training import transfers
from fusedacl.engine.training.storage import checkpoint
from fusedacl.engine.training.trainer import Trainer
from tiny_runs import records, run, weights

Train = Callable[..., dict[str, Any]]


@pytest.fixture
def options(tiny_options: dict[str, Any]) -> dict[str, Any]:
    return {
        **tiny_options,
        "per_device_train_batch_size": 16,
        "learning_rate": 5e-3,
        "num_train_epochs": 3,
        "logging_steps": 1,
        "save_steps": 0,
    }


@pytest.mark.parametrize("objective", ["ce", "scl", "acl"])
@pytest.mark.parametrize("encoder", ["tiny_bert", "tiny_roberta"])
def test_learns(options, objective: str, encoder: str, request: pytest.FixtureRequest) -> None:
    encoder_path = str(request.getfixturevalue(encoder))
    results = run(
        options, objective=objective, model_name_or_path=encoder_path, num_train_epochs=12
    )
    assert results["metrics"]["validation"][2]["accuracy"] > 0.75  # chance: 0.5
    assert bool(results["gate"]) is (objective == "acl")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_learns_in_mixed_precision(options, precision: str) -> None:
    results = run(options, num_train_epochs=12, **{precision: True})
    assert results["metrics"]["validation"][2]["accuracy"] > 0.85


def test_what_a_run_leaves(options) -> None:
    results = run(
        options,
        objective="acl",
        gradient_accumulation_steps=2,
        report_to="tensorboard",
        save_steps=None,
    )
    left = Path(options["output_dir"])
    names = {path.name for path in left.iterdir()}
    assert names >= {
        *("config.yaml", "metrics.jsonl", "results.json", "config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "checkpoint-4", "checkpoint-6"),
    }
    assert "checkpoint-2" not in names  # save_total_limit is 2
    assert json.loads((left / "results.json").read_text())["num_steps"] == 6
    assert any((left / "tensorboard").iterdir())
    steps = records(left, "train", with_speed=True)
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    for record in steps:
        expected = (1 - record["aux_weight"]) * record["loss_ce"]
        expected += record["aux_weight"] * record["loss_aux"]
        assert record["loss"] == pytest.approx(expected)
        assert 0 <= record["angle_degrees"] <= 180
        assert record["samples_per_second"] > 0
    evaluations = records(left, "validation")
    assert [(r["step"], r["exit"]) for r in evaluations] == [(2, 2), (4, 2), (6, 2)]
    assert evaluations[-1]["metrics"] == results["metrics"]["validation"][2]
    assert sum(epoch["steps"] for epoch in results["gate"]) == 6


@pytest.mark.parametrize("changes", [{"objective": "acl"}, {"objective": "scl", "fp16": True}])
def test_resumes_bitwise_in_the_middle_of_an_epoch(options, changes, tmp_path: Path) -> None:
    changes = {**changes, "save_steps": 5, "eval_steps": 4, "save_total_limit": None}
    run(options, **changes)
    whole = Path(options["output_dir"])
    partly = tmp_path / "partly"
    run(options, **changes, output_dir=str(partly))
    for path in (partly / "checkpoint-10").iterdir():
        path.unlink()
    (partly / "checkpoint-10").rmdir()
    (partly / "model.safetensors").unlink()
    results = run(options, **changes, output_dir=str(partly), resume_from_checkpoint="checkpoint-5")
    for name, value in weights(whole).items():
        assert torch.equal(weights(partly)[name], value), name
    assert records(partly) == records(whole)
    assert results["gate"] == json.loads((whole / "results.json").read_text())["gate"]


def test_the_seed_decides_everything(options, tmp_path: Path) -> None:
    directories = [tmp_path / name for name in ("a", "b", "c")]
    for directory, seed in zip(directories, (1, 1, 2), strict=True):
        run(options, output_dir=str(directory), seed=seed, num_train_epochs=1)
    first, same, other = (records(directory, "train") for directory in directories)
    assert first == same
    assert first != other


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(options, number: signal.Signals, monkeypatch) -> None:
    trained = Trainer._train_step

    def train_and_send(self: Trainer, *arguments: Any) -> None:
        trained(self, *arguments)
        if self.step == 3:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Trainer, "_train_step", train_and_send)
    before = signal.getsignal(number)
    with pytest.raises(
        Interrupted, match=f"Stopped by {number.name}. Saved .*checkpoint-3"
    ) as stop:
        run(options)
    assert stop.value.exit_code == 128 + number
    assert signal.getsignal(number) is before
    monkeypatch.undo()
    assert run(options, resume_from_checkpoint="latest")["num_steps"] == 12
    assert [r["step"] for r in records(options["output_dir"], "train")] == list(range(1, 13))


def test_full_disk_keeps_the_last_checkpoint(options, monkeypatch) -> None:
    saved = checkpoint.save_model

    def full_later(directory: Path, *arguments: Any) -> None:
        saved(directory, *arguments)
        if "checkpoint-8" in directory.name:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_model", full_later)
    with pytest.raises(OSError, match="complete checkpoints there: checkpoint-4"):
        run(options, save_steps=None)
    monkeypatch.undo()
    run(options, save_steps=None, resume_from_checkpoint="latest")
    assert (Path(options["output_dir"]) / "results.json").exists()


@pytest.mark.parametrize("is_late", [False, True], ids=["at once", "late"])
@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("weights", "Step 3: the representations of 16 of 16"),
        ("gradient", "Step 3: The gradient is NaN or infinite"),
    ],
)
def test_nan_stops_the_run_and_names_the_step(
    options, monkeypatch, where: str, message: str, is_late: bool
) -> None:
    """Also if the values come from the device when later steps have been taken."""
    trained = Trainer._train_step
    last_step = []

    def poison(self: Trainer, *arguments: Any) -> None:
        weight = self.model.exits[-1].classifier.weight
        if self.step == 2 and where == "weights":
            with torch.no_grad():
                self.model.backbone.embeddings.word_embeddings.weight.fill_(float("nan"))
        elif self.step == 2:
            weight.register_hook(lambda gradient: gradient * float("nan"))
        last_step.append(self.step + 1)
        trained(self, *arguments)

    monkeypatch.setattr(Trainer, "_train_step", poison)
    if is_late:
        monkeypatch.setattr(transfers._Parcel, "has_arrived", lambda parcel: False)
    with pytest.raises(FloatingPointError, match=message):
        run(options, save_steps=6, eval_steps=5)
    # The evaluation of step 5 waits for the values of all steps before it.
    assert last_step[-1] == (5 if is_late else 3)
    left = Path(options["output_dir"])
    assert [record["step"] for record in records(left)] == [1, 2]
    assert not records(left, "validation")
    assert not list(left.glob("checkpoint-*")) and not (left / "model.safetensors").exists()


def test_nothing_bad_is_saved_when_values_are_late(options, monkeypatch) -> None:
    """A checkpoint waits for the values of the steps before it, without an evaluation too."""
    trained = Trainer._train_step

    def poison(self: Trainer, *arguments: Any) -> None:
        if self.step == 4:
            self.model.exits[-1].classifier.weight.register_hook(lambda g: g * float("inf"))
        trained(self, *arguments)

    monkeypatch.setattr(Trainer, "_train_step", poison)
    monkeypatch.setattr(transfers._Parcel, "has_arrived", lambda parcel: False)
    with pytest.raises(FloatingPointError, match="Step 5: The gradient"):
        run(options, save_steps=2, eval_steps=50)
    left = Path(options["output_dir"])
    assert sorted(path.name for path in left.glob("checkpoint-*")) == [
        "checkpoint-2", "checkpoint-4",
    ]  # fmt: skip


def test_nan_in_an_evaluation_stops_the_run(options, monkeypatch) -> None:
    """The step's own losses were finite; what was saved before stays."""
    trained = Trainer._train_step

    def poisoned(self: Trainer, *arguments: Any) -> None:
        trained(self, *arguments)
        if self.step == 8:
            with torch.no_grad():
                self.model.exits[0].classifier.weight.fill_(float("nan"))

    monkeypatch.setattr(Trainer, "_train_step", poisoned)
    message = "Step 8, validation: The exit on layer 2 has NaN or infinite logits for 24 of"
    with pytest.raises(FloatingPointError, match=message):
        run(options, save_steps=None)
    left = Path(options["output_dir"])
    assert [path.name for path in left.glob("checkpoint-*")] == ["checkpoint-4"]
    assert [record["step"] for record in records(left, "validation")] == [4]
    assert not (left / "results.json").exists()


def test_a_gradient_that_is_not_finite_names_the_step(options) -> None:
    with pytest.raises(FloatingPointError, match="Step [0-9]+: "):
        run(options, learning_rate=1e30, max_grad_norm=0, warmup_ratio=0)


def test_overflow_is_logged_as_json_knows_it(options, monkeypatch) -> None:
    monkeypatch.setattr(loss_scaling, "INITIAL_SCALE", 2.0**22)
    run(options, fp16=True, objective="acl")
    skipped = [record for record in records(options["output_dir"], "train") if record["skipped"]]
    assert 0 < len(skipped) < 12
    for record in skipped:
        assert record["grad_norm"] is None
        assert record["angle_degrees"] is None
    draw_angle_histogram(Path(options["output_dir"]), Path(options["output_dir"]) / "angles.png")


def test_resuming_a_finished_run_changes_nothing(options) -> None:
    first = run(options, save_steps=None)
    lines = (Path(options["output_dir"]) / "metrics.jsonl").read_text()
    again = run(options, save_steps=None, resume_from_checkpoint="latest")
    assert (Path(options["output_dir"]) / "metrics.jsonl").read_text() == lines
    assert again["metrics"] == first["metrics"]
    assert again["gate"] == first["gate"]
    assert again["train_samples_per_second"] > 0


def test_a_damaged_checkpoint_is_named(options) -> None:
    run(options, save_steps=None)
    weights_file = Path(options["output_dir"]) / "checkpoint-12" / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="checkpoint-12 is damaged: model.safetensors has 1000 b"):
        run(options, save_steps=None, resume_from_checkpoint="checkpoint-12")


def test_the_model_card_says_what_was_done(options) -> None:
    results = run(options, objective="acl")
    card = (Path(options["output_dir"]) / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["metrics"] == ["accuracy", "macro_f1"]
    # The hub knows no local directory.
    assert "base_model" not in metadata
    assert f"# {Path(options['model_name_or_path']).name} fine-tuned on" in card
    assert "lambda 0.02, tau 0.5, mean over anchors" in card
    accuracy = results["metrics"]["validation"][2]["accuracy"]
    assert f"- validation, exit at layer 2: accuracy {accuracy:.4f}" in card
    assert "gated at 90 degrees (ACL-Grad)" in card
    assert "fusedacl train --model_name_or_path" in card


def test_max_steps_and_fractions_of_epochs(options, tmp_path: Path) -> None:
    assert run(options, max_steps=5)["num_steps"] == 5
    results = run(options, num_train_epochs=0.5, output_dir=str(tmp_path / "half"))
    assert results["num_steps"] == 2
    assert [r["step"] for r in records(tmp_path / "half", "validation")] == [2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_name": "opinion"}, "Did you mean 'opinions'?"),
        ({"max_seq_length": 100}, "max_seq_length=100"),
        ({"model_name_or_path": "./absent"}, "model_name_or_path='./absent' cannot be loaded"),
        ({"impl": "triton"}, "triton"),
    ],
)
def test_mistakes_stop_the_run_before_it_starts(
    options, changes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError) as error:
        run(options, **changes)
    assert message in str(error.value)


def test_a_model_without_tokenizer(options, tiny_bert: Path, tmp_path: Path) -> None:
    directory = tmp_path / "weights_only"
    directory.mkdir()
    for name in ("config.json", "model.safetensors"):
        (directory / name).write_bytes((tiny_bert / name).read_bytes())
    with pytest.raises(ValueError, match="has no tokenizer that can be loaded"):
        run(options, model_name_or_path=str(directory))


def test_an_old_run_is_not_deleted_before_the_new_one_can_start(options) -> None:
    run(options, max_steps=1)
    with pytest.raises(ValueError, match="Did you mean 'opinions'"):
        run(options, overwrite_output_dir=True, task_name="opinoins")
    assert (Path(options["output_dir"]) / "results.json").exists()
