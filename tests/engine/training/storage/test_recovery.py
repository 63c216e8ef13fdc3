"""Runs that are killed go on as if nothing had been; what is damaged is named; the best is kept."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from forked_runs import DEATHS, ForkedRuns
from fusedacl.engine import MultiExitForSequenceClassification, TrainingConfig, train
from fusedacl.engine.cli.main import main
from fusedacl.engine.config.sections import RunOptions
from fusedacl.engine.runtime.manifest import MANIFEST_FILE, fault, sealed, step_of, write_manifest
from fusedacl.engine.runtime.run_lock import RunLock
from fusedacl.engine.training.metrics_log import MetricsLog
from fusedacl.engine.training.storage.best_model import BestModel, scored_layers
from fusedacl.engine.training.storage.checkpoint import (
    STATE_FILE,
    checkpoints,
    find_checkpoint,
    save_checkpoint,
    set_aside,
    state_file,
    tidy,
)


class Saved:
    """Stands for a model and for a tokenizer."""

    def save_pretrained(self, directory: Path, state_dict: object = None) -> None:
        (directory / "model.safetensors").write_bytes(b"weights")


def save(output_dir: Path, *steps: int, keep: int | None = None, best: int | None = None) -> Any:
    """The steps of the checkpoints that are there after saving these."""
    for step in steps:
        save_checkpoint(output_dir, step, Saved(), {}, Saved(), {"step": step}, keep, best)
    return [step_of(path) for path in checkpoints(output_dir)]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def empty(file: Path) -> None:
    for other in file.parent.iterdir():
        other.unlink()


def garble(file: Path) -> None:
    file.write_text("[]")


OTHER_STATE = state_file(1)
DAMAGES: list[tuple[Callable[[Path], object], str, str]] = [
    (cut, "model.safetensors", "is damaged: model.safetensors has 6 bytes, 7 were saved"),
    (flip, "model.safetensors", "is damaged: model.safetensors is not what was saved"),
    (flip, STATE_FILE, "is damaged: training_state.pt is not what was saved"),
    (Path.unlink, OTHER_STATE, "is damaged: training_state-process1.pt is missing"),
    (cut, MANIFEST_FILE, "is damaged: manifest.json cannot be read"),
    (garble, MANIFEST_FILE, "is damaged: manifest.json cannot be read"),
    (Path.unlink, MANIFEST_FILE, "is incomplete: it has no manifest.json"),
    (empty, MANIFEST_FILE, "is incomplete: it has no manifest.json"),
]


@pytest.mark.parametrize(("damage", "name", "words"), DAMAGES)
def test_what_is_damaged_is_named_and_passed_over(
    damage: Callable[[Path], object], name: str, words: str, tmp_path: Path, caplog
) -> None:
    save(tmp_path, 5, 10)
    newest = tmp_path / "checkpoint-10"
    # The files of two processes.
    (newest / OTHER_STATE).write_bytes(b"the other's")
    (newest / MANIFEST_FILE).unlink()
    write_manifest(newest, {file.name: sealed(file) for file in newest.iterdir()})
    assert find_checkpoint(tmp_path, "latest") == newest
    if name == MANIFEST_FILE and damage is cut:
        # Its last byte is the end of the line.
        cut(newest / MANIFEST_FILE)
        assert fault(newest) is None
    damage(newest / name)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fusedacl"):
        assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-5"
    assert f"Not resuming from checkpoint-10: checkpoint-10 {words}" in caplog.text
    for spelling in ("checkpoint-10", str(newest)):
        with pytest.raises(ValueError) as error:
            find_checkpoint(tmp_path, spelling)
        assert f"resume_from_checkpoint={spelling!r}: checkpoint-10 {words}" in str(error.value)
        assert "'latest' takes the newest that is whole" in str(error.value)
    flip(tmp_path / "checkpoint-5" / STATE_FILE)
    with pytest.raises(ValueError, match="resume_from_checkpoint='latest': no such complete"):
        find_checkpoint(tmp_path, "latest")


def test_the_best_checkpoint_is_never_deleted(tmp_path: Path) -> None:
    # As in transformers, the best one counts, except with a limit of one.
    assert save(tmp_path / "1", 1, 2, 3, 4, keep=1, best=2) == [2, 4]
    assert save(tmp_path / "2", 1, 2, 3, 4, keep=2, best=2) == [2, 4]
    assert save(tmp_path / "3", 1, 2, 3, 4, keep=3, best=1) == [1, 3, 4]
    assert save(tmp_path / "3", 5, keep=3, best=5) == [3, 4, 5]
    assert save(tmp_path / "all", 1, 2, 3, best=1) == [1, 2, 3]


def test_later_checkpoints_do_not_count_after_going_back(tmp_path: Path) -> None:
    save(tmp_path, 5, 10, 15)
    (tmp_path / "checkpoint-20").mkdir()
    set_aside(tmp_path, 5)
    names = {path.name for path in tmp_path.iterdir()}
    later = {f"checkpoint-{step}.superseded" for step in (10, 15, 20)}
    assert names == {"checkpoint-5"} | later
    # Those of steps that are reached again go.
    assert save(tmp_path, 10, keep=1) == [10]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoint-10", "checkpoint-15.superseded", "checkpoint-20.superseded"}


def test_tidy_leaves_what_is_complete(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / "checkpoint-10.partial").mkdir()
    (tmp_path / "checkpoint-10.partial" / STATE_FILE).write_text("half")
    tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_one_run_at_a_time(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    RunLock(directory).check_free()
    assert not directory.exists()
    first, second = RunLock(directory), RunLock(directory)
    first.take()
    first.take()
    for attempt in (second.take, second.check_free):
        with pytest.raises(ValueError) as error:
            attempt()
        assert f"(process {os.getpid()} on {socket.gethostname()})" in str(error.value)
    first.release()
    second.check_free()
    second.take()
    second.release()


@pytest.mark.parametrize(
    ("options", "values", "best"),
    [
        ({}, [0.5, 0.3, 0.3, 0.4], 2),
        ({"metric_for_best_model": "eval_loss"}, [0.5, 0.3, 0.2, float("nan")], 3),
        ({"metric_for_best_model": "accuracy"}, [0.5, 0.7, 0.7, 0.6], 2),
        ({"metric_for_best_model": "accuracy", "greater_is_better": False}, [0.5, 0.7, 0.2], 3),
        ({"metric_for_best_model": "f1"}, [float("nan")], None),
    ],
)
def test_best(options: dict[str, Any], values: list[float], best: int | None) -> None:
    made = BestModel(RunOptions(**options), ["accuracy", "f1"], [2])
    for step, value in enumerate(values, start=1):
        made.consider(step, {1: {made.metric: 0.0}, 2: {made.metric: value}})
    assert made.step == best
    again = BestModel(RunOptions(**options), ["accuracy", "f1"], [2])
    again.load_state_dict(made.state_dict())
    assert again.result() == made.result()
    other = BestModel(RunOptions(metric_for_best_model="macro_f1"), ["macro_f1"], [2])
    other.load_state_dict(made.state_dict())
    assert other.step is None


def test_which_exits_choose_the_best() -> None:
    assert scored_layers([2, 4, 6], [2]) == [6]
    assert scored_layers([2, 4, 6], [0, 1, 2]) == [6]
    # The second stage of two_stage leaves the last exit as it is.
    assert scored_layers([2, 4, 6], [0, 1]) == [2, 4]
    made = BestModel(RunOptions(), [], [2, 4])
    made.consider(1, {2: {"loss": 1.0}, 4: {"loss": 2.0}, 6: {"loss": 9.0}})
    assert made.value == 1.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metric_for_best_model": "loss"}, "set load_best_model_at_end too"),
        ({"greater_is_better": False}, "greater_is_better=False chooses the best model"),
        ({"load_best_model_at_end": True, "save_steps": 0}, "save_steps=0 saves none"),
        (
            {"load_best_model_at_end": True, "save_steps": 5},
            "save_steps=5, but eval_steps is unset, which means each epoch",
        ),
        ({"load_best_model_at_end": True, "eval_steps": 5}, "set save_steps=5 too"),
        (
            {"load_best_model_at_end": True, "eval_steps": 5, "save_steps": 12},
            "save_steps=12 is not a multiple of eval_steps=5",
        ),
    ],
)
def test_contradictions_about_the_best(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainingConfig.create(task_name="quickstart", output_dir="run", **options).resolved()
    TrainingConfig.create(
        task_name="quickstart", output_dir="run", load_best_model_at_end=True, eval_steps=5,
        save_steps=10,
    ).resolved()  # fmt: skip


@pytest.fixture
def options(tiny_bert: Path, tiny_data: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "task_name": "opinions", "data_dir": str(tiny_data), "model_name_or_path": str(tiny_bert),
        "max_seq_length": 16, "per_device_train_batch_size": 8, "learning_rate": 5e-3,
        "num_train_epochs": 2, "logging_steps": 1, "save_steps": 1, "dropout": 0.2,
        "device": "cpu", "disable_tqdm": True, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedRuns]:
    with ForkedRuns(tmp_path_factory.mktemp("forked")) as started:
        yield started


def records(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl but for what is measured in seconds."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k != "samples_per_second"} for line in lines]


def results(run: Path) -> dict[str, Any]:
    values = json.loads((run / "results.json").read_text())
    return {name: values.get(name) for name in ("metrics", "gate", "num_steps", "best", "options")}


def assert_same_end(run: Path, undisturbed: Path) -> None:
    name = "model.safetensors"
    assert (run / name).read_bytes() == (undisturbed / name).read_bytes()
    assert records(run) == records(undisturbed)
    assert results(run) == results(undisturbed)
    assert {path.name for path in run.iterdir()} == {path.name for path in undisturbed.iterdir()}


def going_on(options: dict[str, Any]) -> dict[str, Any]:
    """The options with which a user starts a run again, wherever it was killed."""
    if checkpoints(Path(options["output_dir"])):
        return {**options, "resume_from_checkpoint": "latest"}
    return {**options, "overwrite_output_dir": True}


def last_step(run: Path) -> int:
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["step"]
    except (FileNotFoundError, IndexError, json.JSONDecodeError):
        return 0


def kill_at_a_random_moment(runs: ForkedRuns, options: dict[str, Any], chance: Any) -> None:
    """A few steps further than the run has come, somewhere in a step or in a save."""
    run = Path(options["output_dir"])
    complete = checkpoints(run)
    goal = (step_of(complete[-1]) if complete else 0) + chance.randint(0, 2)
    process = runs.start(going_on(options))
    end = time.monotonic() + 60
    while not any(step_of(path) >= goal for path in run.glob("checkpoint-*[0-9]")):
        assert time.monotonic() < end, runs.log.read_text()[-2000:]
        time.sleep(0.005)
    time.sleep(chance.uniform(0, 0.04))
    os.kill(process, signal.SIGKILL)
    assert runs.wait(process) == -signal.SIGKILL, "the run had ended before"
    for path in complete[-1:]:
        # Nothing that was complete is lost, but to make room for newer ones that are complete.
        assert step_of(checkpoints(run)[-1]) >= step_of(path)


STRATEGIES: dict[str, tuple[dict[str, Any], int]] = {
    "two_stage": ({"strategy": "two_stage", "num_train_epochs": 4}, 10),
    "joint": (
        {
            "strategy": "joint", "num_train_epochs": 5, "gradient_accumulation_steps": 2,
            "fp16": True,
        },
        2,
    ),
    "alternating": ({"strategy": "alternating", "num_train_epochs": 4, "bf16": True}, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", STRATEGIES)
def test_killed_at_random_moments(name: str, options, runs: ForkedRuns, tmp_path: Path) -> None:
    changes, num_kills = STRATEGIES[name]
    options = {**options, **changes}
    undisturbed = tmp_path / "undisturbed"
    chance = random.Random(name)
    for _ in range(num_kills):
        kill_at_a_random_moment(runs, options, chance)
    first = runs.start({**options, "output_dir": str(undisturbed)})
    assert runs.wait(first) == 0, runs.log.read_text()[-2000:]
    assert runs.wait(runs.start(going_on(options))) == 0, runs.log.read_text()[-2000:]
    assert_same_end(Path(options["output_dir"]), undisturbed)


def test_killed_in_the_middle_of_a_save(options, runs: ForkedRuns, tmp_path: Path) -> None:
    """At every point of it, one after the other; with the best model kept."""
    options = {
        **options, "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 1,
        # The loss falls, so that where greater is better the best model is an early one.
        "metric_for_best_model": "loss", "greater_is_better": True,
    }  # fmt: skip
    run, undisturbed = Path(options["output_dir"]), tmp_path / "undisturbed"
    for death in DEATHS:
        before = [step_of(path) for path in checkpoints(run)]
        process = runs.start(going_on(options), dies=death)
        assert runs.wait(process) == -signal.SIGKILL, death
        after = [step_of(path) for path in checkpoints(run)]
        assert after[-1] > max(before, default=0), death
        assert all(fault(path) is None for path in checkpoints(run)), death
        assert not (run / "results.json").exists()
    assert runs.wait(runs.start(going_on(options))) == 0, runs.log.read_text()[-2000:]
    assert runs.wait(runs.start({**options, "output_dir": str(undisturbed)})) == 0
    assert_same_end(run, undisturbed)
    best = results(run)["best"]
    assert 0 < best["step"] < 16, "this test is about a best model that is not the last one"
    assert {step_of(path) for path in checkpoints(run)} == {best["step"], 16}
    chosen = run / f"checkpoint-{best['step']}" / "model.safetensors"
    assert (run / "model.safetensors").read_bytes() == chosen.read_bytes()
    scores = [line for line in records(run) if line["split"] == "validation"]
    losses = {line["step"]: line["metrics"]["loss"] for line in scores}
    assert best["value"] == max(losses.values()) == losses[best["step"]]
    assert results(run)["metrics"]["validation"]["2"]["loss"] == best["value"]
    assert f"Scores after step {best['step']}, the best by loss" in (run / "README.md").read_text(
        encoding="utf-8"
    )
    loaded = MultiExitForSequenceClassification.from_pretrained(run).state_dict()
    for key, value in safetensors.torch.load_file(chosen).items():
        assert torch.equal(loaded[key], value), key


def test_a_second_run_is_refused_while_the_first_lives(options, runs: ForkedRuns) -> None:
    options = {**options, "num_train_epochs": 1000, "save_steps": 2}
    run = Path(options["output_dir"])
    first = runs.start(options)
    try:
        end = time.monotonic() + 60
        while not checkpoints(run):
            assert time.monotonic() < end, runs.log.read_text()[-2000:]
            time.sleep(0.01)
        for changes in ({}, {"resume_from_checkpoint": "latest"}, {"overwrite_output_dir": True}):
            with pytest.raises(
                ValueError, match=rf"another run is at work there \(process {first}"
            ):
                train(TrainingConfig.create(**options | changes))
        alive = last_step(run)
        while last_step(run) <= alive:
            assert time.monotonic() < end, "the first run was disturbed"
            time.sleep(0.01)
    finally:
        os.kill(first, signal.SIGKILL)
        runs.wait(first)
    # Its lock ended with it.
    train(TrainingConfig.create(**options | {"overwrite_output_dir": True, "num_train_epochs": 1}))
    assert len(records(run)) == 9


def test_stopped_within_the_last_evaluation(
    options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its step has a checkpoint, and one of two lines of its evaluation is written."""
    options |= {"strategy": "joint", "num_train_epochs": 1, "save_steps": 8, "eval_steps": 5}
    written = MetricsLog.write

    def write_and_fail(self: MetricsLog, record: dict[str, Any]) -> None:
        written(self, record)
        if record["step"] == 8 and "exit" in record:
            raise OSError("the disk is full")

    with monkeypatch.context() as patches:
        patches.setattr(MetricsLog, "write", write_and_fail)
        with pytest.raises(OSError, match="the disk is full"):
            train(TrainingConfig.create(**options))
    run = Path(options["output_dir"])
    assert [line.get("exit") for line in records(run)][-2:] == [None, 1]
    train(TrainingConfig.create(**options, resume_from_checkpoint="latest"))
    undisturbed = tmp_path / "undisturbed"
    train(TrainingConfig.create(**options | {"output_dir": str(undisturbed)}))
    assert [line.get("exit") for line in records(run)][-3:] == [None, 1, 2]
    assert_same_end(run, undisturbed)


def test_the_best_of_the_last_stage(options, tmp_path: Path) -> None:
    options = {
        **options, "strategy": "two_stage", "num_train_epochs": 1, "save_steps": 2, "eval_steps": 2,
        "load_best_model_at_end": True, "save_total_limit": 1, "metric_for_best_model": "loss",
        # It never gets worse, so that greater is better makes the first one the best.
        "greater_is_better": True,
    }  # fmt: skip
    made = train(TrainingConfig.create(**options))
    run = Path(options["output_dir"])
    losses = {
        line["step"]: line["metrics"]["loss"]
        for line in records(run)
        if line["split"] == "validation" and line["exit"] == 1 and line["step"] > 8
    }
    assert list(losses) == [10, 12, 14, 16]
    assert made["best"] == {
        "step": max(losses, key=lambda step: losses[step]), "metric": "loss",
        "value": max(losses.values()),
    }  # fmt: skip
    assert made["best"]["step"] < 16
    # A lost best one is told before going on, and going on without it is possible.
    cut(run / f"checkpoint-{made['best']['step']}" / "model.safetensors")
    with pytest.raises(ValueError, match="the best checkpoint so far is lost"):
        train(TrainingConfig.create(**options, resume_from_checkpoint="latest"))
    del options["load_best_model_at_end"], options["greater_is_better"]
    del options["metric_for_best_model"]
    last = train(TrainingConfig.create(**options, resume_from_checkpoint="latest"))
    assert "best" not in last


def test_another_best_than_the_metrics_have(options) -> None:
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "acuracy"}
    del options["save_steps"]
    with pytest.raises(ValueError, match="'acuracy' is not reported.*Did you mean 'accuracy'"):
        train(TrainingConfig.create(**options))


def test_exits_stores_no_policy_in_a_checkpoint(
    options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options |= {"strategy": "joint", "num_train_epochs": 1, "save_steps": 4}
    train(TrainingConfig.create(**options))
    run = Path(options["output_dir"])
    source = ["--task_name", "opinions", "--data_dir", options["data_dir"], "--disable_tqdm"]
    command = ["exits", "--policy", "entropy", "--max_mean_layer", "2", *source]
    assert main([*command, "--model_name_or_path", str(run / "checkpoint-8")]) == 2
    assert "is a checkpoint: with another policy stored in it" in capsys.readouterr().err
    assert fault(run / "checkpoint-8") is None
    copy = shutil.copytree(run / "checkpoint-8", tmp_path / "copy")
    for directory in (copy, run):
        assert main([*command, "--model_name_or_path", str(directory)]) == 0
    train(TrainingConfig.create(**options, resume_from_checkpoint="checkpoint-8"))


def test_a_checkpoint_of_another_run(options, tmp_path: Path) -> None:
    small = {**options, "num_train_epochs": 1, "save_steps": 4}
    train(TrainingConfig.create(**small))
    other = {**small, "learning_rate": 1e-3, "output_dir": str(tmp_path / "other")}
    train(TrainingConfig.create(**other))
    run = Path(options["output_dir"])
    (tmp_path / "other" / "checkpoint-8").rename(run / "checkpoint-80")
    with pytest.raises(ValueError, match="saved by a run with other options .learning_rate: 0.001"):
        train(TrainingConfig.create(**small, resume_from_checkpoint="latest"))
    with pytest.raises(ValueError, match="no such complete checkpoint"):
        train(
            TrainingConfig.create(
                **small, resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-4")
            )
        )
