"""Runs that are killed or stopped go on as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fusedacl.engine.cli.main import main
from fusedacl.engine.runtime.manifest import fault, step_of
from fusedacl.engine.training.logs.metrics_log import MetricsLog
from fusedacl.engine.training.storage.checkpoint import checkpoints
from killed_runs.forked import DEATHS, ForkedRuns
from tiny_runs import records
from tiny_runs import run as train


@pytest.fixture
def options(tiny_options: dict[str, Any]) -> dict[str, Any]:
    return {
        **tiny_options,
        "per_device_train_batch_size": 8, "learning_rate": 5e-3,
        "num_train_epochs": 2, "logging_steps": 1, "save_steps": 1, "dropout": 0.2,
        "device": "cpu",
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedRuns]:
    with ForkedRuns(tmp_path_factory.mktemp("forked")) as started:
        yield started


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


def run_to_its_end(runs: ForkedRuns, options: dict[str, Any]) -> None:
    assert runs.wait(runs.start(options)) == 0, runs.log.read_text()[-2000:]


def wait_until(runs: ForkedRuns, is_reached: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not is_reached():
        assert time.monotonic() < end, runs.log.read_text()[-2000:]
        time.sleep(0.005)


def kill_at_a_random_moment(runs: ForkedRuns, options: dict[str, Any], chance: Any) -> None:
    """A few steps further than the run has come, somewhere in a step or in a save."""
    run = Path(options["output_dir"])
    complete = checkpoints(run)
    goal = (step_of(complete[-1]) if complete else 0) + chance.randint(0, 2)
    process = runs.start(going_on(options))
    wait_until(runs, lambda: any(step_of(p) >= goal for p in run.glob("checkpoint-*[0-9]")))
    time.sleep(chance.uniform(0, 0.04))
    os.kill(process, signal.SIGKILL)
    assert runs.wait(process) == -signal.SIGKILL, "the run had ended before"
    for path in complete[-1:]:
        # Nothing that was complete is lost, but to make room for newer ones that are complete.
        assert step_of(checkpoints(run)[-1]) >= step_of(path)


@pytest.mark.parametrize(
    ("strategy", "changes", "num_kills"),
    [
        ("two_stage", {"num_train_epochs": 4}, 5),
        ("joint", {"num_train_epochs": 5, "gradient_accumulation_steps": 2, "fp16": True}, 2),
        ("alternating", {"num_train_epochs": 4, "bf16": True}, 2),
    ],
)
def test_killed_at_random_moments(
    strategy: str, changes, num_kills: int, options, runs: ForkedRuns, tmp_path: Path
) -> None:
    options = {**options, "strategy": strategy, **changes}
    undisturbed = tmp_path / "undisturbed"
    chance = random.Random(strategy)
    for _ in range(num_kills):
        kill_at_a_random_moment(runs, options, chance)
    run_to_its_end(runs, {**options, "output_dir": str(undisturbed)})
    run_to_its_end(runs, going_on(options))
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
    run_to_its_end(runs, going_on(options))
    run_to_its_end(runs, {**options, "output_dir": str(undisturbed)})
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
    card = (run / "README.md").read_text(encoding="utf-8")
    assert f"Scores after step {best['step']}, the best by loss" in card


def test_a_second_run_is_refused_while_the_first_lives(options, runs: ForkedRuns) -> None:
    options = {**options, "num_train_epochs": 1000, "save_steps": 2}
    run = Path(options["output_dir"])
    first = runs.start(options)
    try:
        wait_until(runs, lambda: bool(checkpoints(run)))
        for changes in ({}, {"resume_from_checkpoint": "latest"}, {"overwrite_output_dir": True}):
            with pytest.raises(ValueError, match=rf"run is at work there \(process {first}"):
                train(options | changes)
        alive = step_of(checkpoints(run)[-1])
        # The first run is not disturbed.
        wait_until(runs, lambda: step_of(checkpoints(run)[-1]) > alive)
    finally:
        os.kill(first, signal.SIGKILL)
        runs.wait(first)
    # Its lock ended with it.
    train(options | {"overwrite_output_dir": True, "num_train_epochs": 1})
    assert len(records(run)) == 9


def test_stopped_within_the_last_evaluation(options, tmp_path: Path, monkeypatch) -> None:
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
            train(options)
    run = Path(options["output_dir"])
    assert [line.get("exit") for line in records(run)][-2:] == [None, 1]
    train(options, resume_from_checkpoint="latest")
    undisturbed = tmp_path / "undisturbed"
    train(options | {"output_dir": str(undisturbed)})
    assert [line.get("exit") for line in records(run)][-3:] == [None, 1, 2]
    assert_same_end(run, undisturbed)


def test_the_best_of_the_last_stage(options, tmp_path: Path) -> None:
    options = {
        **options, "strategy": "two_stage", "num_train_epochs": 1, "save_steps": 2, "eval_steps": 2,
        "load_best_model_at_end": True, "save_total_limit": 1, "metric_for_best_model": "loss",
        # It never gets worse, so that greater is better makes the first one the best.
        "greater_is_better": True,
    }  # fmt: skip
    made = train(options)
    run = Path(options["output_dir"])
    losses = {
        line["step"]: line["metrics"]["loss"]
        for line in records(run)
        if line["split"] == "validation" and line["exit"] == 1 and line["step"] > 8
    }
    assert list(losses) == [10, 12, 14, 16]
    best = max(losses, key=lambda step: losses[step])
    assert made["best"] == {"step": best, "metric": "loss", "value": losses[best]} and best < 16
    # A lost best one is told before going on, and going on without it is possible.
    weights = run / f"checkpoint-{best}" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match="the best checkpoint so far is lost"):
        train(options, resume_from_checkpoint="latest")
    for name in ("load_best_model_at_end", "greater_is_better", "metric_for_best_model"):
        del options[name]
    assert "best" not in train(options, resume_from_checkpoint="latest")


def test_exits_stores_no_policy_in_a_checkpoint(options, tmp_path: Path, capsys) -> None:
    options |= {"strategy": "joint", "num_train_epochs": 1, "save_steps": 4}
    train(options)
    run = Path(options["output_dir"])
    source = ["--task_name", "opinions", "--data_dir", options["data_dir"], "--disable_tqdm"]
    command = ["exits", "--policy", "entropy", "--max_mean_layer", "2", *source]
    assert main([*command, "--model_name_or_path", str(run / "checkpoint-8")]) == 2
    assert "is a checkpoint: with another policy stored in it" in capsys.readouterr().err
    assert fault(run / "checkpoint-8") is None
    copy = shutil.copytree(run / "checkpoint-8", tmp_path / "copy")
    for directory in (copy, run):
        assert main([*command, "--model_name_or_path", str(directory)]) == 0
    train(options, resume_from_checkpoint="checkpoint-8")


def test_a_checkpoint_of_another_run(options, tmp_path: Path) -> None:
    small = {**options, "num_train_epochs": 1, "save_steps": 4}
    train(small)
    other = {**small, "learning_rate": 1e-3, "output_dir": str(tmp_path / "other")}
    train(other)
    run = Path(options["output_dir"])
    (tmp_path / "other" / "checkpoint-8").rename(run / "checkpoint-80")
    with pytest.raises(ValueError, match="saved by a run with other options .learning_rate: 0.001"):
        train(small, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="no such complete checkpoint"):
        train(small, resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-4"))
