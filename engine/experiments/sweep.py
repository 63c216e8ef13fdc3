"""`fusedacl sweep`: train the runs of a recipe, each in a process and a directory of its own.

A stopped sweep continues with the same command: finished runs are kept, and interrupted runs resume
from their checkpoints.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..config.fields import flatten
from ..config.training import TrainingConfig
from ..runtime.files import write_json, write_whole
from ..runtime.lock import SweepLock
from ..runtime.machine import cpu_model, num_cores
from ..runtime.signals import SignalsNoted
from ..runtime.text import text_table
from ..training.storage.checkpoint import CONFIG_FILE, changed_options, checkpoints
from .recipe import Cell, plan_cells
from .report_plan import plan_report
from .results import SCHEMA, SWEEP_FILE, read_record
from .runs import read_results

logger = logging.getLogger("fusedacl")
# Options that are paths, which change when a sweep is moved.
_PATH_OPTIONS = ("stage1_model", "feature_cache")
_POLL_SECONDS = 0.2
# Time between the signal and a kill: enough for a step and a checkpoint of the largest model.
_STOP_SECONDS = 600.0


class SweepStopped(Exception):
    """A signal stopped the sweep, after its runs had saved checkpoints."""

    def __init__(self, number: int, directory: Path) -> None:
        super().__init__(
            f"Stopped by {signal.Signals(number).name}; run the same command again to go on in "
            f"{directory}."
        )
        self.exit_code = 128 + number


@dataclass
class _Run:
    """A cell and the state of its run.

    seconds: of all sessions of the run that have ended; None: nothing is known.
    """

    cell: Cell
    status: str = "waiting"
    seconds: float | None = None
    error: str | None = None
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0

    def end_session(self) -> None:
        """Add the time since the start to that of earlier sessions."""
        self.seconds = round((self.seconds or 0.0) + time.monotonic() - self.started, 1)


class Sweep:
    """The cells of a recipe in a directory; mistakes are reported before any run starts.

    Args:
        workers: number of runs at the same time; None: `default_workers`.

    Raises:
        ValueError: a mistake in the recipe (see `plan_cells`), or the directory is a file or holds
            runs with other options.
    """

    def __init__(
        self, recipe: Mapping[str, Any], directory: str | Path, workers: int | None = None
    ) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"workers={workers}: at least one run at a time.")
        self.recipe = dict(recipe)
        self.runs = [_Run(cell) for cell in plan_cells(recipe)]
        # Reports mistakes in the report section now instead of after days of training.
        plan_report(recipe)
        self.directory = Path(directory).resolve()
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"output_dir={str(directory)!r} is a file; name a directory.")
        self.workers = workers or default_workers()
        self.by_directory = {run.cell.directory: run for run in self.runs}
        self.signals = SignalsNoted("the runs save checkpoints and stop …", patient=True)
        self.lock = SweepLock(self.directory)
        self._look()

    def _look(self) -> None:
        """Take over what earlier sessions left of the waiting runs.

        Raises:
            ValueError: they have other options, or finished ones have lost their first stage.
        """
        seconds: dict[str, float | None] = {}
        # There is no record before the first session.
        with contextlib.suppress(ValueError):
            cells = read_record(self.directory)["cells"]
            seconds = {cell["directory"]: cell["seconds"] for cell in cells}
        for run in self.runs:
            if run.status == "waiting":
                self._inspect(run, seconds.get(run.cell.directory))
        for run in self.runs:
            first = self._first_stage(run)
            if run.status == "done" and first is not None and first.status != "done":
                where, lost = (self.directory / of.cell.directory for of in (run, first))
                raise ValueError(
                    f"{run.cell.name}: its first stage {str(lost)!r} is deleted or not finished, "
                    "and a new one would have other weights. Delete "
                    f"{str(where)!r} too, so that it is trained again."
                )

    def _inspect(self, run: _Run, seconds: float | None) -> None:
        directory = self.directory / run.cell.directory
        if not (directory / CONFIG_FILE).is_file():
            return
        config = run.cell.config(self.directory)
        changed = changed_options(directory, config, free=_PATH_OPTIONS, choice_too=True)
        if changed:
            raise ValueError(
                f"{run.cell.name}: {str(directory)!r} holds a run with other options "
                f"({'; '.join(changed)}). Delete it, or name another output_dir for the changed "
                "recipe."
            )
        run.seconds = seconds
        if finished_results(directory) is not None:
            run.status = "done"

    def recall(self) -> None:
        """Take the states of unfinished runs from sweep.json, for `--status`."""
        try:
            cells = read_record(self.directory)["cells"]
        except ValueError:
            return
        seen = {cell["directory"]: (cell["status"], cell["error"]) for cell in cells}
        for run in self.runs:
            if run.status == "done" or run.cell.directory not in seen:
                continue
            run.status, run.error = seen[run.cell.directory]
            if run.status == "running" and not self.lock.is_held():
                # The sweep was killed before it could record the end of the run.
                run.status = "interrupted"

    def run(self) -> list[Path]:
        """Run the unfinished cells; returns the directories of all finished runs.

        Raises:
            SweepStopped: SIGINT, SIGTERM or SIGHUP was received; active runs saved checkpoints.
            ValueError: another sweep is running there, or has left other runs meanwhile.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        with self.lock.held(), self.signals:
            # Another sweep may have finished some of the runs until it released the lock.
            self._look()
            recipe = yaml.safe_dump(self.recipe, sort_keys=False)
            write_whole(self.directory / "recipe.yaml", recipe)
            self._write()
            for run in self.runs:
                self._drop_features(run)
            try:
                self._loop()
            finally:
                self._stop_all()
                self._write()
        if self.signals.received is not None:
            raise SweepStopped(self.signals.received, self.directory)
        return [self.directory / run.cell.directory for run in self.runs if run.status == "done"]

    def _loop(self) -> None:
        while self.signals.received is None:
            for run in self._active():
                self._finish(run)
            for run in self.runs:
                first = self._first_stage(run)
                if run.status == "waiting" and first and first.status in ("failed", "blocked"):
                    run.status, run.error = "blocked", f"its first stage failed: {first.cell.name}"
            for run in self.runs:
                if len(self._active()) < self.workers and self._ready(run):
                    self._start(run)
            if not self._active():
                return
            time.sleep(_POLL_SECONDS)

    def _active(self) -> list[_Run]:
        return [run for run in self.runs if run.status == "running"]

    def _first_stage(self, run: _Run) -> _Run | None:
        return None if run.cell.stage1 is None else self.by_directory[run.cell.stage1]

    def _ready(self, run: _Run) -> bool:
        first = self._first_stage(run)
        if run.status != "waiting" or (first is not None and first.status != "done"):
            return False
        # A cache is written by a single run; the others read it afterwards.
        sharing = self._sharing(run)
        cache = self.directory / (run.cell.features or "")
        return (cache / "meta.json").is_file() or all(r.status != "running" for r in sharing)

    def _sharing(self, run: _Run) -> list[_Run]:
        """The runs that read the same features, with this one."""
        features = run.cell.features
        return [r for r in self.runs if features is not None and r.cell.features == features]

    def command(self, run: _Run) -> list[str]:
        """The command that trains a cell, from the start or from its last checkpoint."""
        directory = self.directory / run.cell.directory
        command = [sys.executable, "-m", "fusedacl.engine", "train"]
        defaults = flatten(TrainingConfig())
        for name, value in flatten(run.cell.config(self.directory)).items():
            if value != defaults[name]:
                command += [f"--{name}", str(value)]
        if checkpoints(directory):
            command += ["--resume_from_checkpoint", "latest"]
        elif directory.exists():
            command += ["--overwrite_output_dir", "true"]
        return command

    def _start(self, run: _Run) -> None:
        directory = self.directory / run.cell.directory
        directory.parent.mkdir(parents=True, exist_ok=True)
        if not checkpoints(directory):
            self._drop_features_of(run)
        threads = str(max(1, num_cores() // self.workers))
        with log_file(directory).open("ab") as log:
            run.process = subprocess.Popen(
                self.command(run),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={"OMP_NUM_THREADS": threads, **os.environ},
                pass_fds=self.lock.descriptors,
                # Otherwise a Ctrl-C in the terminal would reach the run twice.
                start_new_session=True,
            )
        run.status, run.started = "running", time.monotonic()
        self._write()

    def _finish(self, run: _Run) -> None:
        assert run.process is not None
        code = run.process.poll()
        if code is None:
            return
        directory = self.directory / run.cell.directory
        run.end_session()
        results = finished_results(directory)
        if code == 0 and results is not None:
            run.status = "done"
        elif self.signals.received is not None:
            run.status = "interrupted"
        else:
            run.status = "failed"
            log = log_file(directory)
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            # Relative, because a sweep may be moved.
            place = log.relative_to(self.directory)
            run.error = f"{_ending(code)}: {lines[-1] if lines else 'no output'} ({place})"
        self._drop_features(run)
        self._write()
        self._announce(run, results)

    def _drop_features_of(self, first: _Run) -> None:
        """Delete the features of a first stage that is trained again: its weights may differ."""
        for run in self.runs:
            trained_by = run.cell.stage1 or run.cell.directory
            if run.cell.features is not None and trained_by == first.cell.directory:
                shutil.rmtree(self.directory / run.cell.features, ignore_errors=True)

    def _drop_features(self, run: _Run) -> None:
        """Delete the features of a run, which take gigabytes, if no other run will read them."""
        if run.cell.features is not None and all(
            other.status not in ("waiting", "running") for other in self._sharing(run)
        ):
            shutil.rmtree(self.directory / run.cell.features, ignore_errors=True)

    def _announce(self, run: _Run, results: dict[str, Any] | None) -> None:
        ended = [other for other in self.runs if other.status in ("done", "failed", "blocked")]
        words = run.error or (main_score(results) if results else run.status)
        timed = [other.seconds for other in ended if other.seconds]
        to_do = sum(other.status in ("waiting", "running") for other in self.runs)
        seconds = to_do * sum(timed) / max(1, len(timed)) / self.workers
        left = f"; about {seconds / 60:.0f} min left" if seconds else ""
        logger.info(
            "[%d/%d] %s: %s (%.0f s%s)",
            len(ended), len(self.runs), run.cell.name, words, run.seconds or 0.0, left,
        )  # fmt: skip

    def _stop_all(self) -> None:
        """Ask the active runs to save checkpoints and exit, and wait for them."""
        active = [(run, run.process) for run in self._active() if run.process is not None]
        for _, process in active:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        deadline = time.monotonic() + _STOP_SECONDS
        for run, process in active:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
            run.status = "done" if process.wait() == 0 else "interrupted"
            run.end_session()

    def _write(self) -> None:
        of_cell = ("task", "method", "seed", "grid", "directory")
        cells = [
            {name: getattr(run.cell, name) for name in of_cell}
            | {"status": run.status, "seconds": run.seconds, "error": run.error}
            for run in self.runs
        ]
        environment = {"machine": f"{cpu_model()}, {num_cores()} cores", "workers": self.workers}
        values = {"schema": SCHEMA, "recipe": self.recipe, "environment": environment}
        write_json(self.directory / SWEEP_FILE, {**values, "cells": cells})
        active = [run.process.pid for run in self._active() if run.process]
        self.lock.name([os.getpid(), *active])

    def table(self) -> str:
        """Progress of each method (row) on each task (column): "2 of 3", and what failed."""
        tasks = list(dict.fromkeys(run.cell.task for run in self.runs))
        statuses: dict[str, dict[str, list[str]]] = {}
        for run in self.runs:
            row = statuses.setdefault(run.cell.method, {task: [] for task in tasks})
            row[run.cell.task].append(run.status)
        rows = [[method, *map(_progress, row.values())] for method, row in statuses.items()]
        return text_table(["method", *tasks], rows)

    @property
    def failures(self) -> list[str]:
        """A line for each run that failed or could not start."""
        return [f"{run.cell.name}: {run.error}" for run in self.runs if run.error is not None]


def default_workers() -> int:
    """Number of runs at the same time: one per two cores, and a single one with a GPU."""
    import torch

    return 1 if torch.cuda.is_available() else max(1, num_cores() // 2)


def finished_results(directory: Path) -> dict[str, Any] | None:
    """The results of a run; None if it has none yet."""
    try:
        return read_results(directory)
    except ValueError:
        return None


def main_score(results: Mapping[str, Any]) -> str:
    """The first metric of the last exit on the first split: "accuracy 0.8123"."""
    for by_layer in results["metrics"].values():
        name, value = next(iter(by_layer[max(by_layer, key=int)].items()))
        return f"{name} {value:.4f}"
    return "done"


def log_file(directory: Path) -> Path:
    """File for the output of a run; beside its directory, which a restart may empty."""
    return directory.with_name(directory.name + ".log")


def _ending(code: int) -> str:
    """The end of a process in words: "exit status 2", "killed by SIGKILL (out of memory?)"."""
    if code >= 0:
        return f"exit status {code}"
    name = signal.Signals(-code).name
    return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def _progress(statuses: Sequence[str]) -> str:
    if not statuses:
        return ""
    words = f"{statuses.count('done')} of {len(statuses)}"
    for name in ("running", "failed", "blocked", "interrupted"):
        words += f", {statuses.count(name)} {name}" if name in statuses else ""
    return words
