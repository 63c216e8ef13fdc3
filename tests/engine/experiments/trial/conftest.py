"""Trials whose runs take seconds of a made-up clock and leave made-up scores."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fusedacl.engine.config.fields import flatten, write_yaml
from fusedacl.engine.experiments.sweep import Sweep, SweepStopped
from fusedacl.engine.experiments.trial import trial
from fusedacl.engine.experiments.trial.setting import Setting, read_setting
from fusedacl.engine.experiments.trial.trial import Trial

BATCH = 32


@dataclass
class World:
    """The clock, and what runs do.

    step_seconds: by method. other_seconds: of a run, beside its steps. scores: method -> accuracy
    by seed, from 1; the last one is repeated. stop_after: runs after which SIGINT comes, once.
    failing: methods that fail. trained: names of the runs that were completed.
    """

    now: float = 0.0
    step_seconds: dict[str, float] = field(
        default_factory=lambda: {"CE": 1.0, "CE+SCL": 1.0, "ACL": 2.0}
    )
    other_seconds: float = 10.0
    scores: dict[str, list[float]] = field(
        default_factory=lambda: {"CE": [0.8], "CE+SCL": [0.8], "ACL": [0.81]}
    )
    stop_after: int | None = None
    failing: tuple[str, ...] = ()
    failure: str = "exit status 1: no memory"
    trained: list[str] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make trials take their runs from here."""
        world = self

        class StandIn(Sweep):
            def run(self) -> list[Path]:
                self.directory.mkdir(parents=True, exist_ok=True)
                try:
                    world.run_all(self)
                finally:
                    self._write()
                return []

        monkeypatch.setattr(trial, "Sweep", StandIn)

    def run_all(self, sweep: Sweep) -> None:
        for run in sweep.runs:
            if run.status == "done":
                continue
            if self.stop_after is not None and len(self.trained) >= self.stop_after:
                self.stop_after = None
                raise SweepStopped(signal.SIGINT, sweep.directory)
            config = run.cell.config(sweep.directory)
            method, steps = run.cell.method, config.optimization.max_steps
            run.seconds = self.other_seconds + steps * self.step_seconds[method]
            self.now += run.seconds
            if method in self.failing:
                run.status, run.error = "failed", self.failure
                continue
            directory = sweep.directory / run.cell.directory
            directory.mkdir(parents=True)
            write_yaml(config, directory / "config.yaml")
            (directory / "model.safetensors").write_text("weights")
            self.write_results(directory, method, run.cell.seed, steps, flatten(config))
            run.status = "done"
            self.trained.append(run.cell.name)

    def write_results(
        self, directory: Path, method: str, seed: int, steps: int, options: dict[str, Any]
    ) -> None:
        scores = self.scores[method]
        score = scores[min(max(seed, 1), len(scores)) - 1]
        gate = {
            "epoch": 1, "group": "model", "steps": steps, "dropped_share": 0.25,
            "angle_p10": 70.0, "angle_median": 80.0, "angle_p90": 95.0,
        }  # fmt: skip
        results = {
            "data": "opinions",
            "metrics": {"validation": {"2": {"accuracy": score, "loss": 0.5}}},
            "gate": [gate] if method == "ACL" else [],
            "train_seconds": steps * self.step_seconds[method],
            "options": {**options, "gate": "angle" if method == "ACL" else "none"},
        }
        (directory / "results.json").write_text(json.dumps(results))
        # The first steps of a process are slow.
        seconds = [10.0, 10.0, *[self.step_seconds[method]] * (steps - 2)]
        records = [
            {
                "step": step, "epoch": 1.0, "split": "train", "samples_per_second": BATCH / second,
                **({"angle_degrees": 80.0 + step % 2} if method == "ACL" else {}),
            }
            for step, second in enumerate(seconds, start=1)
        ]  # fmt: skip
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (directory / "metrics.jsonl").write_text(lines)


@pytest.fixture
def make_world(monkeypatch: pytest.MonkeyPatch) -> Callable[..., World]:
    """A world with these fields, from which all trials take their runs until the next is made."""

    def make(**fields: Any) -> World:
        world = World(**fields)
        world.install(monkeypatch)
        return world

    return make


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    """Timing the methods takes 62 s, a draw of the setting 70 s."""
    return make_world(scores={"CE": [0.8, 0.82, 0.79], "CE+SCL": [0.81], "ACL": [0.82, 0.85, 0.8]})


@pytest.fixture
def opinions(tiny_bert: Path, tiny_data: Path) -> Callable[..., Setting]:
    """The setting of a trial on `opinions` with runs of ten steps, and with changed options."""
    options = {
        "task_name": "opinions",
        "data_dir": str(tiny_data),
        "model_name_or_path": str(tiny_bert),
        "max_steps": 10,
    }
    return lambda **changes: read_setting({**options, **changes})


@pytest.fixture
def setting(opinions: Callable[..., Setting]) -> Setting:
    return opinions()


@pytest.fixture
def start() -> Callable[..., Trial]:
    """A trial in a directory, by the clock of a world."""

    def make(
        world: World, setting: Setting, directory: Path, minutes: float = 5, draws: int = 10
    ) -> Trial:
        return Trial(setting, directory, minutes, draws, clock=world.clock)

    return make
