"""Sweeps: order, failures, stopping and resuming, with stand-in runs; once with real ones."""

from __future__ import annotations

import json
import os
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
from fusedacl.engine.experiments.sweep import Sweep, SweepStopped, _Run

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
ONE_SEED = RECIPE | {"seeds": [1]}
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


def when_started(sweep: StandInSweep, number: int, action: Callable[[], object]) -> None:
    """Call `action` from a thread, once so many runs have started."""

    def wait() -> None:
        while not sweep.journal.exists() or len(sweep.order()) < number:
            time.sleep(0.02)
        action()

    threading.Thread(target=wait, daemon=True).start()


def start(sweep: StandInSweep, number: int) -> subprocess.Popen[bytes]:
    """Start one run of a sweep that is not at work."""
    sweep._start(sweep.runs[number])
    return sweep.runs[number].process


def statuses(directory: Path) -> dict[str, str]:
    cells = json.loads((directory / "sweep.json").read_text())["cells"]
    return {f"{cell['method']} {cell['seed']}": cell["status"] for cell in cells}


def test_first_stages_first_and_nothing_twice(tmp_path: Path) -> None:
    sweep = StandInSweep(RECIPE, tmp_path, workers=2)
    assert len(sweep.run()) == 6
    order = sweep.order()
    for seed in (1, 2):
        end = order.index(f"end ce/seed-{seed}")
        assert all(order.index(f"start {name}/seed-{seed}") > end for name in ("acl", "kd"))
    assert set(statuses(tmp_path).values()) == {"done"}
    again = StandInSweep(RECIPE, tmp_path)
    assert len(again.run()) == 6 and again.order() == order
    assert "2 of 2" in again.table() and not again.failures


def test_as_many_at_a_time_as_there_are_workers(tmp_path: Path) -> None:
    recipe = RECIPE | {"seeds": [1, 2, 3, 4], "methods": {"CE": METHODS["CE"]}}
    for workers in (1, 3):
        sweep = StandInSweep(recipe, tmp_path / str(workers), workers=workers)
        sweep.seconds = 0.5
        sweep.run()
        at_once, most = 0, 0
        for line in sweep.order():
            at_once += 1 if line.startswith("start") else -1
            most = max(most, at_once)
        assert most == workers


def test_features_are_written_by_one_run_and_deleted(tmp_path: Path) -> None:
    sweep = StandInSweep(ONE_SEED | {"share_features": True}, tmp_path, workers=4)
    sweep.run()
    # Two runs share features: the second waits until the first has written them.
    one_by_one = [f"{what} {name}/seed-1" for name in ("acl", "kd") for what in ("start", "end")]
    assert sweep.order()[2:] == one_by_one
    assert list((tmp_path / "features").iterdir()) == []


def test_a_failure_blocks_what_needs_it_and_nothing_else(tmp_path: Path) -> None:
    methods = METHODS | {"SCL": {"objective": "scl"}}
    sweep = StandInSweep(ONE_SEED | {"methods": methods}, tmp_path)
    sweep.failing = ("CE",)
    assert len(sweep.run()) == 1
    assert statuses(tmp_path) == {
        "CE 1": "failed", "ACL 1": "blocked", "KD 1": "blocked", "SCL 1": "done",
    }  # fmt: skip
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
    assert len(StandInSweep(RECIPE, tmp_path).run()) == 6


def test_one_sweep_a_directory(tmp_path: Path) -> None:
    first = StandInSweep(RECIPE, tmp_path)
    with first.lock.held(), pytest.raises(ValueError, match="another sweep is running there"):
        StandInSweep(RECIPE, tmp_path).run()


def test_a_run_that_a_killed_sweep_left_behind_is_not_started_again(tmp_path: Path) -> None:
    killed = StandInSweep(ONE_SEED, tmp_path)
    killed.seconds = 2.0
    with killed.lock.held():
        left = start(killed, 0)
    # The sweep no longer holds the lock, but its run does.
    again = StandInSweep(killed.recipe, tmp_path)
    with pytest.raises(ValueError, match=rf"left behind \(process \d+, {left.pid} on "):
        again.run()
    assert again.lock.is_held()
    left.wait()
    assert not again.lock.is_held() and len(StandInSweep(killed.recipe, tmp_path).run()) == 3
    assert killed.order().count("start ce/seed-1") == 1


def test_status_tells_what_became_of_runs(tmp_path: Path) -> None:
    sweep = StandInSweep(ONE_SEED, tmp_path)
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


def test_features_that_a_killed_sweep_left_are_deleted(tmp_path: Path) -> None:
    recipe = ONE_SEED | {"share_features": True}
    StandInSweep(recipe, tmp_path).run()
    (tmp_path / str(StandInSweep(recipe, tmp_path).runs[1].cell.features)).mkdir()
    StandInSweep(recipe, tmp_path).run()
    assert list((tmp_path / "features").iterdir()) == []


def test_features_of_a_first_stage_that_is_trained_anew_are_deleted(tmp_path: Path) -> None:
    recipe = {**RECIPE, "seeds": [1, 2], "share_features": True}
    sweep = StandInSweep(recipe, tmp_path)
    stale, other = (tmp_path / str(sweep.runs[place].cell.features) for place in (1, 4))
    for directory in (stale, other):
        directory.mkdir(parents=True)
        (directory / "states").write_text("of earlier weights")
    start(sweep, 0).wait()
    assert not stale.exists() and other.exists()
    # A second stage does not delete the features of others.
    stale.mkdir()
    start(sweep, 1).wait()
    assert stale.exists()


def test_what_killed_a_run(tmp_path: Path) -> None:
    sweep = StandInSweep(ONE_SEED | {"methods": {"CE": METHODS["CE"]}}, tmp_path)
    sweep.seconds = 60
    when_started(sweep, 1, lambda: sweep.runs[0].process.kill())
    assert sweep.run() == []
    assert "killed by SIGKILL (out of memory?): no output" in sweep.failures[0]


def test_a_changed_recipe_is_refused(tmp_path: Path) -> None:
    StandInSweep(RECIPE, tmp_path).run()
    changed = {**RECIPE, "defaults": {"model_name_or_path": "bert", "learning_rate": 1e-3}}
    with pytest.raises(ValueError, match=r"rte, CE, seed 1: .*learning_rate: 2e-05 then, 0.001 no"):
        StandInSweep(changed, tmp_path)
    with pytest.raises(ValueError, match="workers=0"):
        StandInSweep(RECIPE, tmp_path, workers=0)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="output_dir='.*file' is a file"):
        StandInSweep(RECIPE, tmp_path / "file")


def test_a_moved_sweep_is_the_same(tmp_path: Path) -> None:
    StandInSweep(RECIPE, tmp_path / "here").run()
    (tmp_path / "here").rename(tmp_path / "there")
    moved = StandInSweep(RECIPE, tmp_path / "there")
    assert [run.status for run in moved.runs] == ["done"] * 6


def test_real_runs(tiny_bert: Path, tiny_data: Path, tmp_path: Path, capsys) -> None:
    """The command, with a first stage that a second stage uses, and shared features."""
    options = {"max_seq_length": 16, "num_train_epochs": 1, "save_steps": 0}
    recipe = ONE_SEED | {
        "defaults": {"model_name_or_path": str(tiny_bert), **options},
        "share_features": True,
        "tasks": {"opinions": {}},
        "methods": {name: METHODS[name] for name in ("CE", "ACL")},
    }
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
    finished = subprocess.run(
        [sys.executable, "-m", "fusedacl.engine", "sweep", "--help"], capture_output=True, text=True
    )
    assert finished.returncode == 0 and "minilm_all" in finished.stdout
