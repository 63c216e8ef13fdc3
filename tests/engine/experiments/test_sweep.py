"""Sweeps: order, failures, stopping and resuming, with stand-in runs; once with real ones."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fusedacl.engine.cli.main import main
from fusedacl.engine.config.fields import write_yaml
from fusedacl.engine.experiments.sweep import Sweep, SweepStopped, _Run, default_workers

METHODS: dict[str, Any] = {
    "CE": {"objective": "ce"},
    "ACL": {"stage1": "CE", "strategy": "two_stage", "objective": "acl"},
    "KD": {"stage1": "CE", "strategy": "two_stage", "objective": "ce", "distill_weight": 0.5},
}
RECIPE: dict[str, Any] = {
    "defaults": {"model_name_or_path": "bert"},
    "seeds": [1, 2],
    "tasks": {"rte": {}},
    "methods": METHODS,
}
# A run, as far as it matters to a sweep.
STAND_IN = """
import json, pathlib, sys, time
directory, action, seconds = pathlib.Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
with open(sys.argv[4], "a") as journal:
    journal.write(f"start {directory}\\n")
time.sleep(seconds)
if action == "fail":
    sys.exit("Something is wrong.")
if sys.argv[5]:
    features = pathlib.Path(sys.argv[5])
    features.mkdir(parents=True, exist_ok=True)
    (features / "meta.json").write_text("{}")
metrics = {"validation": {"6": {"accuracy": 0.5, "loss": 1.0}}}
results = {"metrics": metrics, "train_seconds": 1.0, "options": {}}
(directory / "results.json").write_text(json.dumps(results))
with open(sys.argv[4], "a") as journal:
    journal.write(f"end {directory}\\n")
"""


class StandInSweep(Sweep):
    """A sweep whose runs are `STAND_IN`; `failing`: methods; `seconds`: duration of a run."""

    failing: tuple[str, ...] = ()
    seconds = 0.0

    def command(self, run: _Run) -> list[str]:
        directory = self.directory / run.cell.directory
        directory.mkdir(parents=True, exist_ok=True)
        write_yaml(run.cell.config(self.directory), directory / "config.yaml")
        action = "fail" if run.cell.method in self.failing else "work"
        features = "" if run.cell.features is None else str(self.directory / run.cell.features)
        return [
            sys.executable, "-S", "-c", STAND_IN, str(directory), action, str(self.seconds),
            str(self.journal), features,
        ]  # fmt: skip

    @property
    def journal(self) -> Path:
        return self.directory / "journal"

    def order(self) -> list[str]:
        """Starts and ends of runs in order: "start ce/seed-1"."""
        lines = self.journal.read_text().splitlines()
        return [line.replace(f"{self.directory}/cells/rte/", "") for line in lines]


def when_started(sweep: StandInSweep, num_runs: int, action: Callable[[], None]) -> None:
    def wait() -> None:
        while not sweep.journal.exists() or len(sweep.order()) < num_runs:
            time.sleep(0.02)
        action()

    threading.Thread(target=wait, daemon=True).start()


def start_and_wait(sweep: StandInSweep, run: _Run) -> None:
    sweep._start(run)
    assert run.process is not None
    run.process.wait()


def seconds_of(directory: Path) -> dict[str, float | None]:
    cells = json.loads((directory / "sweep.json").read_text())["cells"]
    return {cell["directory"]: cell["seconds"] for cell in cells}


def statuses(directory: Path) -> dict[str, str]:
    cells = json.loads((directory / "sweep.json").read_text())["cells"]
    return {f"{cell['method']} {cell['seed']}": cell["status"] for cell in cells}


def test_first_stages_first_and_nothing_twice(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    sweep = StandInSweep(RECIPE, here, workers=2)
    assert len(sweep.run()) == 6
    order = sweep.order()
    for seed in (1, 2):
        end = order.index(f"end ce/seed-{seed}")
        assert all(order.index(f"start {name}/seed-{seed}") > end for name in ("acl", "kd"))
    assert set(statuses(here).values()) == {"done"}
    again = StandInSweep(RECIPE, here)
    assert len(again.run()) == 6 and again.order() == order
    assert "2 of 2" in again.table() and not again.failures
    here.rename(there)
    assert [run.status for run in StandInSweep(RECIPE, there).runs] == ["done"] * 6


def test_as_many_at_a_time_as_there_are_workers(tmp_path: Path) -> None:
    recipe = {**RECIPE, "seeds": [1, 2, 3, 4], "methods": {"CE": {"objective": "ce"}}}
    for workers in (1, 3):
        sweep = StandInSweep(recipe, tmp_path / str(workers), workers)
        sweep.seconds = 0.5
        sweep.run()
        at_once, most = 0, 0
        for line in sweep.order():
            at_once += 1 if line.startswith("start") else -1
            most = max(most, at_once)
        assert most == workers


def test_features_are_written_by_one_run_and_deleted(tmp_path: Path) -> None:
    sweep = StandInSweep({**RECIPE, "seeds": [1], "share_features": True}, tmp_path, workers=4)
    sweep.run()
    # Two runs share features: the second waits until the first has written them.
    assert sweep.order()[2:] == [
        "start acl/seed-1", "end acl/seed-1", "start kd/seed-1", "end kd/seed-1",
    ]  # fmt: skip
    assert list((tmp_path / "features").iterdir()) == []
    # The next sweep deletes what a killed one left.
    (tmp_path / str(sweep.runs[1].cell.features)).mkdir()
    StandInSweep(sweep.recipe, tmp_path).run()
    assert list((tmp_path / "features").iterdir()) == []


def test_a_failure_blocks_what_needs_it_and_nothing_else(tmp_path: Path) -> None:
    methods = {**METHODS, "SCL": {"objective": "scl"}}
    sweep = StandInSweep({**RECIPE, "seeds": [1], "methods": methods}, tmp_path)
    sweep.failing = ("CE",)
    assert len(sweep.run()) == 1
    assert list(statuses(tmp_path).values()) == ["failed", "blocked", "blocked", "done"]
    assert "exit status 1: Something is wrong. (cells/rte/ce/seed-1.log)" in sweep.failures[0]
    assert "its first stage failed: rte, CE, seed 1" in sweep.failures[1]
    assert "0 of 1, 1 blocked" in sweep.table()
    mended = StandInSweep(sweep.recipe, tmp_path)
    assert len(mended.run()) == 4


def test_stops_and_goes_on(tmp_path: Path) -> None:
    sweep = StandInSweep(RECIPE, tmp_path, workers=2)
    sweep.seconds = 60
    when_started(sweep, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SweepStopped, match="SIGTERM") as stopped:
        sweep.run()
    assert stopped.value.exit_code == 143
    assert sorted(statuses(tmp_path).values()) == ["interrupted"] * 2 + ["waiting"] * 4
    assert all(run.process is None or run.process.poll() is not None for run in sweep.runs)
    # The seconds of a run are those of all its sessions; a finished one keeps them.
    first = seconds_of(tmp_path)
    stopped_runs = [place for place, seconds in first.items() if seconds is not None]
    assert len(stopped_runs) == 2
    record = (tmp_path / "sweep.json").read_text()
    for place in stopped_runs:
        record = record.replace(f'"seconds": {first[place]}', '"seconds": 1000.0')
    (tmp_path / "sweep.json").write_text(record)
    assert len(StandInSweep(RECIPE, tmp_path).run()) == 6
    second = seconds_of(tmp_path)
    for place, seconds in second.items():
        assert seconds is not None
        assert 1000 <= seconds < 1060 if place in stopped_runs else 0 <= seconds < 60
    StandInSweep(RECIPE, tmp_path).run()
    assert seconds_of(tmp_path) == second


def test_a_run_that_a_killed_sweep_left_behind_is_not_started_again(tmp_path: Path) -> None:
    killed = StandInSweep({**RECIPE, "seeds": [1]}, tmp_path)
    killed.seconds = 2.0
    with killed.lock.held():
        killed._start(killed.runs[0])
    # The sweep no longer holds the lock, but its run does.
    left = killed.runs[0].process
    assert left is not None
    again = StandInSweep(killed.recipe, tmp_path)
    with pytest.raises(ValueError, match=rf"left behind \(process \d+, {left.pid} on "):
        again.run()
    assert again.lock.is_held()
    left.wait()
    assert not again.lock.is_held() and len(StandInSweep(killed.recipe, tmp_path).run()) == 3
    assert killed.order().count("start ce/seed-1") == 1


def test_runs_that_another_sweep_finished_meanwhile_are_not_started_again(tmp_path: Path) -> None:
    """As one that holds the lock until shortly after this one has read the directory."""
    late = StandInSweep(RECIPE, tmp_path)
    assert len(StandInSweep(RECIPE, tmp_path).run()) == 6
    order, seconds = late.order(), seconds_of(tmp_path)
    assert len(late.run()) == 6
    assert late.order() == order and seconds_of(tmp_path) == seconds


def test_workers_follow_the_cores_that_the_process_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert default_workers() == 3
    sweep = StandInSweep({**RECIPE, "seeds": [1], "methods": {"CE": METHODS["CE"]}}, tmp_path)
    given: dict[str, str] = {}
    start = subprocess.Popen

    def popen(*arguments: Any, env: dict[str, str], **options: Any) -> Any:
        given.update(env)
        return start(*arguments, env=env, **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    sweep.run()
    environment = json.loads((tmp_path / "sweep.json").read_text())["environment"]
    assert environment["machine"].endswith(", 6 cores") and environment["workers"] == 3
    assert given["OMP_NUM_THREADS"] == "2"


def test_status_tells_what_became_of_runs(tmp_path: Path) -> None:
    sweep = StandInSweep({**RECIPE, "seeds": [1]}, tmp_path)
    sweep.failing = ("CE",)
    sweep.run()
    seen = StandInSweep(sweep.recipe, tmp_path)
    assert not seen.failures
    seen.recall()
    assert seen.failures == sweep.failures and "1 failed" in seen.table()
    with sweep.lock.held():
        sweep.runs[0].status = "running"
        sweep._write()
        seen.recall()
        assert seen.runs[0].status == "running"
    # No process holds the lock, so the sweep was killed.
    seen.recall()
    assert seen.runs[0].status == "interrupted"


def test_features_of_a_first_stage_that_is_trained_anew_are_deleted(tmp_path: Path) -> None:
    recipe = {**RECIPE, "seeds": [1, 2], "share_features": True}
    sweep = StandInSweep(recipe, tmp_path)
    stale, other = (tmp_path / str(sweep.runs[place].cell.features) for place in (1, 4))
    for directory in (stale, other):
        directory.mkdir(parents=True)
        (directory / "states").write_text("of earlier weights")
    start_and_wait(sweep, sweep.runs[0])
    assert not stale.exists() and other.exists()
    # A second stage does not delete the features of others.
    stale.mkdir()
    start_and_wait(sweep, sweep.runs[1])
    assert stale.exists()


def test_second_stages_of_a_deleted_first_stage_are_refused(tmp_path: Path) -> None:
    StandInSweep(RECIPE, tmp_path).run()
    shutil.rmtree(tmp_path / "cells/rte/ce/seed-2")
    with pytest.raises(ValueError, match=r"rte, ACL, seed 2: .*ce/seed-2' is deleted or.* Delete"):
        StandInSweep(RECIPE, tmp_path)
    for name in ("acl", "kd"):
        shutil.rmtree(tmp_path / f"cells/rte/{name}/seed-2")
    assert len(StandInSweep(RECIPE, tmp_path).run()) == 6


def test_what_killed_a_run(tmp_path: Path) -> None:
    sweep = StandInSweep({**RECIPE, "seeds": [1], "methods": {"CE": METHODS["CE"]}}, tmp_path)
    sweep.seconds = 60
    when_started(sweep, 1, lambda: sweep.runs[0].process.kill())
    assert sweep.run() == []
    assert "killed by SIGKILL (out of memory?): no output" in sweep.failures[0]


def test_a_changed_recipe_is_refused(tmp_path: Path) -> None:
    StandInSweep(RECIPE, tmp_path).run()
    changed = {**RECIPE, "defaults": {"model_name_or_path": "bert", "learning_rate": 1e-3}}
    with pytest.raises(ValueError, match=r"rte, CE, seed 1: .*learning_rate: 2e-05 then, 0.001 no"):
        StandInSweep(changed, tmp_path)
    for option, value in (("load_best_model_at_end", True), ("early_stopping_patience", 2)):
        changed = {**RECIPE, "defaults": {"model_name_or_path": "bert", option: value}}
        with pytest.raises(ValueError, match=rf"CE, seed 1: .*{option}: (None|False) then"):
            StandInSweep(changed, tmp_path)
    # It only says what is written meanwhile.
    often = {**RECIPE, "defaults": {"model_name_or_path": "bert", "eval_steps": 7}}
    assert [run.status for run in StandInSweep(often, tmp_path).runs] == ["done"] * 6
    with pytest.raises(ValueError, match="workers=0"):
        StandInSweep(RECIPE, tmp_path, workers=0)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="output_dir='.*file' is a file"):
        StandInSweep(RECIPE, tmp_path / "file")


def test_real_runs(tiny_bert: Path, tiny_data: Path, tmp_path: Path, capsys) -> None:
    """The command, with a first stage that a second stage uses, and shared features."""
    defaults = {"model_name_or_path": str(tiny_bert), "max_seq_length": 16}
    defaults |= {"num_train_epochs": 1, "save_steps": 0}
    methods = {name: METHODS[name] for name in ("CE", "ACL")}
    recipe = {"defaults": defaults, "seeds": [1], "share_features": True}
    recipe |= {"tasks": {"opinions": {}}, "methods": methods}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    arguments = ["sweep", str(file), "--output_dir", str(tmp_path / "out")]
    # Data are named on the command line, because recipes are used on several machines.
    arguments += ["--data_dir", str(tiny_data)]
    assert main([*arguments, "--status"]) == 0
    assert "0 of 1" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out.count("1 of 1") == 2 and "fusedacl report" in out
    results = json.loads((tmp_path / "out/cells/opinions/acl/seed-1/results.json").read_text())
    assert list(results["metrics"]["validation"]) == ["1", "2"]
    assert "Feature cache" in (tmp_path / "out/cells/opinions/acl/seed-1.log").read_text()
    assert yaml.safe_load((tmp_path / "out/recipe.yaml").read_text())["defaults"]["data_dir"]


def test_command_line_mistakes(tmp_path: Path, capsys) -> None:
    assert main(["sweep", "minilm_all", "--learning_rat", "1"]) == 2
    assert "'learning_rate'" in capsys.readouterr().err
    assert main(["sweep", "nonesuch"]) == 2
    assert "shipped recipe" in capsys.readouterr().err
    command = [sys.executable, "-m", "fusedacl.engine", "sweep", "--help"]
    assert "minilm_all" in subprocess.check_output(command, text=True)
