"""Runs that are killed or stopped go on as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from forked_runs import DEATHS, ForkedRuns
from fusedacl.engine import MultiExitForSequenceClassification, TrainingConfig, train
from fusedacl.engine.cli.main import main
from fusedacl.engine.runtime.manifest import fault, step_of
from fusedacl.engine.training.metrics_log import MetricsLog
from fusedacl.engine.training.storage.checkpoint import (
    checkpoints,
)
from tiny_runs import records


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
    weights = run / f"checkpoint-{made['best']['step']}" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
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
