"""The runs of a trial, as many draws as fit into its time.

A draw is one run of each method with the same seed, hence on the same texts in the same order. All
draws are one sweep, which grows by a seed at a time.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ...runtime.files import write_json
from ...runtime.lock import SweepLock
from ...training.storage.checkpoint import differences
from ..runs import read_metrics
from ..sweep import Sweep, SweepStopped
from .setting import BASE, METHODS, PILOT_STEPS, Setting, Size

logger = logging.getLogger("fusedacl")
RECORD_FILE = "trial.json"
SCHEMA = 1
_PILOT = "pilot"
# The end of a run that refused its options, its data or its encoder.
_MISTAKE = ": exit status 2: "
# Draws that the size of the training set leaves time for, the first choice first.
_WANTED_DRAWS = (4, 3, 2, 1)
# The first steps of a process allocate memory and compile kernels.
WARM_UP_STEPS = 2
# The weights of runs on parts of the data serve nobody, and take gigabytes.
_WEIGHTS = ("*.safetensors", "checkpoint-*")


class Trial:
    """A trial in a directory; mistakes are reported before any run starts.

    Args:
        minutes: of all sessions of the trial together. A draw is started if it should end in time.
        max_draws: no more draws than these, however short they are.

    Raises:
        ValueError: a value out of range; the directory has other contents, or those of a trial
            with other options.
    """

    def __init__(
        self,
        setting: Setting,
        directory: Path,
        minutes: float,
        max_draws: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 < minutes < math.inf:
            raise ValueError(f"minutes={minutes:g}: a trial takes some time; name more than 0.")
        if max_draws < 1:
            raise ValueError(f"draws={max_draws}: at least one draw.")
        self.setting, self.directory = setting, directory
        self.budget, self.max_draws = 60 * minutes, max_draws
        self._clock, self._started = clock, clock()
        self.record = self._read_record()
        self._before = float(self.record["seconds"])

    def _read_record(self) -> dict[str, Any]:
        now = self.setting.identity
        fresh = {"schema": SCHEMA, "setting": now, "seconds": 0.0, "draws": []}
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"output_dir={str(self.directory)!r} is a file; name a directory.")
        file = self.directory / RECORD_FILE
        if not file.is_file():
            if self.directory.is_dir() and any(self.directory.iterdir()):
                raise ValueError(
                    f"output_dir={str(self.directory)!r} holds something else than a trial: name a "
                    "new directory."
                )
            return fresh
        try:
            found = dict(json.loads(file.read_text(encoding="utf-8")))
            before, schema = dict(found["setting"]), found["schema"]
            float(found["seconds"]), [draw["seconds"] for draw in found["draws"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{str(file)!r} is not the record of a trial: {error!r}") from None
        if schema != SCHEMA:
            raise ValueError(
                f"{str(file)!r} has schema {schema!r}; this version of fusedacl reads {SCHEMA}."
            )
        names = sorted(before.keys() | now.keys())
        changed = differences(*({name: of.get(name) for name in names} for of in (before, now)))
        if changed:
            raise ValueError(
                f"output_dir={str(self.directory)!r} holds a trial with other options or data "
                f"({'; '.join(changed)}). Delete it, or name another directory."
            )
        return found

    @property
    def spent(self) -> float:
        """Seconds of all sessions of the trial until now."""
        return self._before + self._clock() - self._started

    @property
    def draws(self) -> list[float]:
        """Seconds of each complete draw."""
        return [float(draw["seconds"]) for draw in self.record["draws"] if draw["done"]]

    @property
    def size(self) -> Size:
        """The size of the training set that was chosen."""
        return self.setting.size(self.record["per_class"])

    def run(self) -> list[str]:
        """Run draws until the time is used; returns a line for each run that failed.

        Raises:
            ValueError: the time is too short for one draw, the first runs refuse their options, or
                another process runs the trial.
            SweepStopped: a signal stopped the trial, which the same command continues.
        """
        for place in (self.directory, self.directory / _PILOT):
            SweepLock(place).check_free()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._write()
        try:
            if "step_seconds" not in self.record:
                failures = self._measure()
                if failures:
                    return failures
            if "per_class" not in self.record:
                self._choose_size()
            while self._goes_on():
                failures = self._draw()
                if failures:
                    return failures
            if not self.record["draws"]:
                # The time of the draw just fitted when its size was chosen, and no longer does.
                self._refuse(self.size)
        finally:
            self._write()
        return []

    def _write(self) -> None:
        self.record["seconds"] = round(self.spent, 1)
        write_json(self.directory / RECORD_FILE, self.record)

    def _measure(self) -> list[str]:
        """Time a few steps of each method, and what a run takes beside its steps."""
        directory = self.directory / _PILOT
        # Times of an interrupted pilot are incomplete.
        shutil.rmtree(directory, ignore_errors=True)
        logger.info("Timing %d steps of each method.", PILOT_STEPS)
        sweep = Sweep(self.setting.pilot(), directory, workers=1)
        steps, others = {}, {}
        try:
            sweep.run()
        except SweepStopped as stop:
            raise SweepStopped(stop.exit_code - 128, self.directory) from None
        for failure in sweep.failures:
            if _MISTAKE in failure:
                raise ValueError(failure)
        if sweep.failures:
            return sweep.failures
        for run in sweep.runs:
            seconds = step_seconds(directory / run.cell.directory, self.setting.texts_of_step)
            steps[run.cell.method] = seconds
            others[run.cell.method] = max(0.0, float(run.seconds or 0) - PILOT_STEPS * seconds)
        # A run of a draw evaluates more texts. Each takes at most its share of a training step of
        # cross-entropy, since evaluation has no backward pass.
        rest = self.setting.texts_left * steps[BASE] / self.setting.texts_of_step
        others = {method: seconds + rest for method, seconds in others.items()}
        self.record |= {"step_seconds": steps, "other_seconds": others}
        self._write()
        shutil.rmtree(directory, ignore_errors=True)
        return []

    def draw_seconds(self, size: Size) -> float:
        """The time of a draw by the measured steps."""
        steps, others = self.record["step_seconds"], self.record["other_seconds"]
        return float(sum(others[name] + size.num_steps * steps[name] for name in METHODS))

    def _choose_size(self) -> None:
        """Take the largest training set that leaves time for several draws."""
        left, sizes = self.budget - self.spent, self.setting.sizes()
        for num_draws in _WANTED_DRAWS:
            for size in sizes:
                if min(num_draws, self.max_draws) * self.draw_seconds(size) <= left:
                    self.record["per_class"] = size.per_class
                    self._write()
                    return
        self._refuse(min(sizes, key=self.draw_seconds))

    def _refuse(self, size: Size) -> NoReturn:
        """Refuse a time in which not one draw of this size fits, and forget what was timed."""
        steps, others = self.record["step_seconds"], self.record["other_seconds"]
        seconds = self.draw_seconds(size)
        of_steps = ", ".join(f"{steps[name]:.2g} s for {name}" for name in METHODS)
        needed = [math.ceil((self.spent + number * seconds) / 60) for number in (1, 2)]
        words = (
            f"minutes={self.budget / 60:g} is too short: one draw of {', '.join(METHODS)} takes "
            f"about {seconds / 60:.1f} minutes here ({size.num_steps} steps of {of_steps}, and "
            f"{sum(others.values()):.0f} s to start and evaluate the runs). With what was spent on "
            f"timing them: --minutes {needed[0]} for one draw, {needed[1]} for two, which an "
            "interval needs. Shorter: --max_steps, --max_eval_samples, --max_seq_length, or fewer "
            "texts."
        )
        # The machine may have been busy: the next session times the steps anew.
        for name in ("step_seconds", "other_seconds", "per_class"):
            self.record.pop(name, None)
        self._before, self._started = 0.0, self._clock()
        raise ValueError(words)

    @property
    def next_seconds(self) -> float:
        """The expected time of another draw: the longest so far, or by the measured steps."""
        return max(self.draws, default=self.draw_seconds(self.size))

    def _goes_on(self) -> bool:
        if len(self.draws) < len(self.record["draws"]):
            return True  # a draw that was begun is completed
        fits = self.spent + self.next_seconds <= self.budget
        return fits and len(self.draws) < self.max_draws

    def _draw(self) -> list[str]:
        """Run the next draw, or the rest of one that was begun; returns what failed."""
        draws = self.record["draws"]
        if len(self.draws) == len(draws):
            draws.append({"seconds": 0.0, "done": False})
        sweep = Sweep(self.setting.recipe(self.size, len(draws)), self.directory, workers=1)
        logger.info("Draw %d, about %.1f minutes.", len(draws), self.next_seconds / 60)
        draw, earlier, start = draws[-1], draws[-1]["seconds"], self._clock()
        self._write()
        try:
            sweep.run()
        finally:
            draw["seconds"] = round(earlier + self._clock() - start, 1)
        if sweep.failures:
            return sweep.failures
        draw["done"] = True
        self._write()
        for run in sweep.runs:
            _drop_weights(self.directory / run.cell.directory)
        return []


def step_seconds(run: Path, texts: int) -> float:
    """Median time of the logged steps of a run, each of so many texts, without the first ones.

    Raises:
        ValueError: the run has no metrics.jsonl, or logged no step.
    """
    speeds = step_speeds(run)
    if not speeds:
        raise ValueError(f"{str(run)!r} logged no training step.")
    return texts / statistics.median(speeds)


def step_speeds(run: Path) -> list[float]:
    """Texts per second in the logged steps of a run, without the first ones if there are more.

    Raises:
        ValueError: the run has no metrics.jsonl.
    """
    found = [
        float(record["samples_per_second"])
        for record in read_metrics(run)
        if record["split"] == "train" and record.get("samples_per_second")
    ]
    return found[WARM_UP_STEPS:] or found


def _drop_weights(run: Path) -> None:
    for pattern in _WEIGHTS:
        for path in run.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
