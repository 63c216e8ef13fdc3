"""Whole runs on tiny models: what they learn and leave, how they stop and go on."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fusedacl.engine.runtime import collectives
from fusedacl.engine.runtime.signals import Interrupted, stopping_signals
from fusedacl.engine.training import trainer, transfers
from fusedacl.engine.training.trainer import Trainer
from tiny_runs import at_step, records, run, weights

Train = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("objective", ["ce", "scl", "acl"])
@pytest.mark.parametrize("encoder", ["tiny_bert", "tiny_roberta"])
def test_learns(options, objective: str, encoder: str, request: pytest.FixtureRequest) -> None:
    encoder_path = str(request.getfixturevalue(encoder))
    results = run(
        options, objective=objective, model_name_or_path=encoder_path, num_train_epochs=12
    )
    assert results["metrics"]["validation"][2]["accuracy"] > 0.75  # chance: 0.5
    assert bool(results["gate"]) is (objective == "acl")


def test_what_a_run_leaves(options) -> None:
    options |= {"gradient_accumulation_steps": 2, "report_to": "tensorboard"}
    results = run(options, objective="acl", save_steps=None)
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


SCOPED = {"gate_agreement_steps": 2, "eval_steps": 50}


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "acl"},
        {"objective": "scl", "fp16": True},
        {"gate_scope": "top:1", **SCOPED},
        {"gate_scope": "head", **SCOPED},
    ],
)
def test_resumes_bitwise_in_the_middle_of_an_epoch(options, changes, tmp_path: Path) -> None:
    options |= {"save_steps": 5, "eval_steps": 4, "save_total_limit": None, **changes}
    run(options)
    whole, partly = Path(options["output_dir"]), tmp_path / "partly"
    shutil.copytree(whole, partly)
    shutil.rmtree(partly / "checkpoint-10")
    (partly / "model.safetensors").unlink()
    results = run(options, output_dir=str(partly), resume_from_checkpoint="checkpoint-5")
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


@pytest.fixture
def with_a_terminal() -> Iterator[None]:
    """SIGHUP as a shell leaves it to a program, also where pytest itself was started by nohup."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, previous)


def test_under_nohup_a_closed_terminal_stops_nothing(with_a_terminal: None) -> None:
    assert signal.SIGHUP in stopping_signals()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert stopping_signals() == [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_stops(
    options, number: signal.Signals, with_a_terminal: None, monkeypatch
) -> None:
    at_step(monkeypatch, 3, lambda trainer: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    message = f"Stopped by {number.name}. Saved .*checkpoint-3"
    with pytest.raises(Interrupted, match=message) as stop:
        run(options)
    assert stop.value.exit_code == 128 + number
    assert signal.getsignal(number) is before
    monkeypatch.undo()
    assert run(options, resume_from_checkpoint="latest")["num_steps"] == 12
    assert [r["step"] for r in records(options["output_dir"], "train")] == list(range(1, 13))


def poison_weights(trainer: Trainer) -> None:
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if name.endswith(("word_embeddings.weight", "classifier.weight")):
                weight.fill_(float("nan"))


def poison_gradient(trainer: Trainer) -> None:
    trainer.model.exits[-1].classifier.weight.register_hook(lambda gradient: gradient / 0)


@pytest.mark.parametrize("is_late", [False, True], ids=["at once", "late"])
@pytest.mark.parametrize(
    ("poison", "message"),
    [
        (poison_weights, "Step 3: the representations of 16 of 16"),
        (poison_gradient, "Step 3: The gradient is NaN or infinite"),
    ],
)
def test_nan_stops_the_run_and_names_the_step(
    options, monkeypatch, poison: Callable[[Trainer], None], message: str, is_late: bool
) -> None:
    """Also if the values come from the device when later steps have been taken."""
    poisoned: list[Trainer] = []
    for action in (poisoned.append, poison):
        at_step(monkeypatch, 3, action, before=True)
    if is_late:
        monkeypatch.setattr(transfers._Parcel, "has_arrived", lambda parcel: False)
    with pytest.raises(FloatingPointError, match=message):
        run(options, save_steps=6, eval_steps=5)
    # The evaluation of step 5 waits for the values of all steps before it.
    assert poisoned[0].step == (5 if is_late else 3)
    left = Path(options["output_dir"])
    assert [record["step"] for record in records(left)] == [1, 2]
    assert not records(left, "validation")
    assert not list(left.glob("checkpoint-*")) and not (left / "model.safetensors").exists()


def test_nothing_bad_is_saved_when_values_are_late(options, monkeypatch) -> None:
    """A checkpoint waits for the values of the steps before it, without an evaluation too."""
    at_step(monkeypatch, 5, poison_gradient, before=True)
    monkeypatch.setattr(transfers._Parcel, "has_arrived", lambda parcel: False)
    with pytest.raises(FloatingPointError, match="Step 5: The gradient"):
        run(options, save_steps=2, eval_steps=50)
    left = Path(options["output_dir"])
    assert {path.name for path in left.glob("check*")} == {"checkpoint-2", "checkpoint-4"}


def test_nan_in_an_evaluation_stops_the_run(options, monkeypatch) -> None:
    """The step's own losses were finite; what was saved before stays."""
    at_step(monkeypatch, 8, poison_weights)
    message = "Step 8, validation: The exit on layer 2 has NaN or infinite logits for 24 of"
    with pytest.raises(FloatingPointError, match=message):
        run(options, save_steps=None)
    left = Path(options["output_dir"])
    assert [path.name for path in left.glob("checkpoint-*")] == ["checkpoint-4"]
    assert [record["step"] for record in records(left, "validation")] == [4]
    assert not (left / "results.json").exists()


def test_resuming_a_finished_run_changes_nothing(options) -> None:
    first = run(options, save_steps=None)
    lines = (Path(options["output_dir"]) / "metrics.jsonl").read_text()
    again = run(options, save_steps=None, resume_from_checkpoint="latest")
    assert (Path(options["output_dir"]) / "metrics.jsonl").read_text() == lines
    assert again["metrics"] == first["metrics"]
    assert again["gate"] == first["gate"]
    assert again["train_samples_per_second"] > 0


def test_a_resumed_run_that_is_stopped_has_no_end(
    options, tiny_data: Path, tmp_path: Path, monkeypatch
) -> None:
    """The old end stays until resuming is certain."""
    files = [str(shutil.copy(tiny_data / "opinions" / "validation.jsonl", tmp_path / "test.jsonl"))]
    files += [str(tiny_data / "opinions" / f"{name}.jsonl") for name in ("train", "validation")]
    source = dict(zip(("test_file", "train_file", "validation_file"), files, strict=True))
    options |= {**source, "task_name": None, "data_dir": None, "do_predict": True, "profile": 1}
    options |= {"save_steps": None, "save_total_limit": None}
    run(options)
    left = Path(options["output_dir"])
    end = [left / name for name in ("results.json", "profile.json", "test_predictions.csv")]
    (left / "my_predictions.csv").touch()
    options |= {"resume_from_checkpoint": "checkpoint-4", "profile": 0}
    lines = (left / "metrics.jsonl").read_text()
    (left / "metrics.jsonl").write_text("no record\n" + lines)
    with pytest.raises(ValueError, match="line 1, is not a record"):
        run(options)
    assert all(file.exists() for file in end)
    (left / "metrics.jsonl").write_text(lines)
    at_step(monkeypatch, 6, lambda trainer: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted):
        run(options)
    assert not any(file.exists() for file in end) and (left / "my_predictions.csv").exists()
    monkeypatch.undo()
    run(options, resume_from_checkpoint="latest")
    assert end[0].exists() and end[2].exists()


@pytest.mark.parametrize("name", ["MetricsLog", "save_final", "write_json"])
def test_what_the_first_process_cannot_write_ends_all(options, name: str, monkeypatch) -> None:
    """Within an action of all processes, so that the others do not wait for the first one."""
    inside: list[int] = []
    together = collectives.together

    def noted(action: Callable[[], Any]) -> Any:
        inside.append(1)
        made = together(action)
        inside.pop()
        return made

    def fail(*arguments: Any) -> None:
        assert inside
        raise OSError("the disk is full")

    monkeypatch.setattr(collectives, "together", noted)
    monkeypatch.setattr(trainer, name, fail)
    with pytest.raises(OSError, match="the disk is full"):
        run(options, max_steps=1)


def test_max_steps_and_fractions_of_epochs(options, tmp_path: Path) -> None:
    assert run(options, max_steps=5)["num_steps"] == 5
    results = run(options, num_train_epochs=0.5, output_dir=str(tmp_path / "half"))
    assert results["num_steps"] == 2
    assert [r["step"] for r in records(tmp_path / "half", "validation")] == [2]


def test_a_model_without_tokenizer(options, tiny_bert: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(
        tiny_bert, tmp_path / "weights", ignore=shutil.ignore_patterns("*token*", "vocab*")
    )
    with pytest.raises(ValueError, match="has no tokenizer that can be loaded"):
        run(options, model_name_or_path=str(directory))


def test_an_old_run_is_not_deleted_before_the_new_one_can_start(options, monkeypatch) -> None:
    run(options, max_steps=1)
    wrong = {"Did you mean 'opinions'": {"task_name": "opinoins"}}
    for message, changes in (wrong | {"max_seq_length=100": {"max_seq_length": 100}}).items():
        with pytest.raises(ValueError, match=message):
            run(options, overwrite_output_dir=True, **changes)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://there")
    with pytest.raises(ValueError, match="report_to=mlflow: the server cannot be used"):
        run(options, overwrite_output_dir=True, report_to="mlflow")
    assert (Path(options["output_dir"]) / "results.json").exists()
