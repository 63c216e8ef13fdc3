"""What a sweep left: the cells of sweep.json, their scores, and why a score is not there."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..runtime.text import did_you_mean
from .sweep import SCHEMA, SWEEP_FILE

Grid = tuple[tuple[str, Any], ...]
_KEYS = ("task", "method", "seed", "grid", "directory", "status", "error")


class NotThereError(Exception):
    """A run has no such score; the text says why."""


@dataclass(frozen=True)
class SweepRun:
    """One cell: a task, a method, values of its grid, a seed; `results` where it is done."""

    task: str
    method: str
    seed: int
    grid: Grid
    directory: Path
    # Why there are no results; None where there are.
    problem: str | None
    results: dict[str, Any] | None

    @property
    def label(self) -> str:
        """Method and grid values: "CE+SCL sweep, aux_weight 0.1"."""
        return grid_label(self.method, self.grid)

    def layers(self, split: str | None = None) -> dict[int, dict[str, Any]]:
        """Layer -> metrics on a split, the first by default.

        Raises:
            NotThereError: the run is not done, or has no such split.
        """
        if self.results is None:
            raise NotThereError(self.problem)
        splits = self.results["metrics"]
        name = next(iter(splits), None) if split is None else split
        if name not in splits:
            raise NotThereError("it was not evaluated" + (f" on {split}" if split else ""))
        return {int(layer): metrics for layer, metrics in splits[name].items()}

    def score(self, metric: str, layer: int | None = None, split: str | None = None) -> float:
        """One exit's score as a fraction, the last exit's by default.

        Raises:
            NotThereError: there is none, or it is no finite number.
        """
        by_layer = self.layers(split)
        layer = max(by_layer) if layer is None else layer
        if layer not in by_layer:
            raise NotThereError(f"it has no exit on layer {layer}")
        value = by_layer[layer].get(metric)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise NotThereError(f"{metric} at layer {layer} is {value}")
        return float(value)

    def average(self, metric: str) -> float:
        """The mean of the scores of all exits; raises as `score`."""
        return statistics.mean(self.score(metric, layer) for layer in self.layers())


@dataclass(frozen=True)
class Seeds:
    """Scores of one method on one task: seed -> score as a fraction, seed -> why there is none."""

    values: Mapping[int, float]
    problems: Mapping[int, str]

    @property
    def mean(self) -> float:
        return statistics.mean(self.values.values())

    @property
    def deviation(self) -> float | None:
        """Standard deviation (n - 1); None for a single seed."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    @property
    def words(self) -> str:
        """In percent: "65.0 ± 7.1", "65.0" for a single seed, or nothing."""
        return mean_and_deviation(list(self.values.values()))

    def __len__(self) -> int:
        return len(self.values)

    def __bool__(self) -> bool:
        return bool(self.values)


@dataclass(frozen=True)
class SweepResults:
    """All cells of a sweep, in the recipe's order."""

    directory: Path
    recipe: Mapping[str, Any]
    runs: tuple[SweepRun, ...]
    environment: Mapping[str, Any]

    @cached_property
    def tasks(self) -> list[str]:
        """In the recipe's order, those that have cells."""
        found = dict.fromkeys(run.task for run in self.runs)
        named = [task for task in self.recipe.get("tasks", {}) if task in found]
        return list(dict.fromkeys([*named, *found]))

    @cached_property
    def methods(self) -> list[str]:
        """In the recipe's order, those that have cells."""
        found = dict.fromkeys(run.method for run in self.runs)
        named = [method for method in self.recipe.get("methods", {}) if method in found]
        return list(dict.fromkeys([*named, *found]))

    @property
    def done(self) -> list[SweepRun]:
        return [run for run in self.runs if run.results is not None]

    def grids(self, method: str) -> list[Grid]:
        """The grid points of a method, one empty one where it has no grid."""
        return list(dict.fromkeys(run.grid for run in self.runs if run.method == method))

    def of(self, task: str, method: str, grid: Grid = ()) -> list[SweepRun]:
        """The seeds of one method on one task."""
        wanted = (task, method, grid)
        return [run for run in self.runs if (run.task, run.method, run.grid) == wanted]

    def seeds(self, task: str, method: str, grid: Grid, read: Callable[[SweepRun], float]) -> Seeds:
        """What `read` finds in every seed's run."""
        values: dict[int, float] = {}
        problems: dict[int, str] = {}
        for run in self.of(task, method, grid):
            try:
                values[run.seed] = read(run)
            except NotThereError as error:
                problems[run.seed] = str(error)
        return Seeds(values, problems)

    def splits(self, task: str) -> list[str]:
        """The evaluation splits of a task's runs, the main one first."""
        for run in self.done:
            if run.task == task and run.results is not None and run.results["metrics"]:
                return list(run.results["metrics"])
        return []

    def metric(self, task: str, wanted: str | None = None) -> str | None:
        """The metric of a task: `wanted`, or the first that its runs report; None: no run is done.

        Raises:
            ValueError: its runs do not report `wanted`.
        """
        for run in self.done:
            if run.task != task:
                continue
            try:
                names = [name for name in next(iter(run.layers().values())) if name != "loss"]
            except (NotThereError, StopIteration):
                continue
            if wanted is not None and wanted not in names:
                raise ValueError(
                    f"metric={wanted!r} is not among the metrics of {task}."
                    f"{did_you_mean(wanted, names)}"
                )
            return wanted or names[0]
        return None


def mean_and_deviation(values: Sequence[float]) -> str:
    """Fractions as a mean in percent, with the standard deviation (n - 1) where there is one."""
    if not values:
        return ""
    percent = [100 * value for value in values]
    if len(percent) == 1:
        return f"{percent[0]:.1f}"
    return f"{statistics.mean(percent):.1f} ± {statistics.stdev(percent):.1f}"


def grid_label(name: str, grid: Grid) -> str:
    """A name with the values of a grid."""
    return ", ".join([name, *(f"{option} {value}" for option, value in grid)])


def missing_notes(label: str, task: str, problems: Mapping[int, str]) -> list[str]:
    """One sentence on the seeds of a method that have no score, or none: seed -> why."""
    if not problems:
        return []
    by_reason: dict[str, list[str]] = {}
    for seed, reason in problems.items():
        by_reason.setdefault(reason, []).append(str(seed))
    words = "; ".join(
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)} ({reason})"
        for reason, seeds in by_reason.items()
    )
    return [f"Missing: {label} on {task}, {words}."]


def is_sweep(path: Path) -> bool:
    """Whether a directory is a sweep's."""
    return (path / SWEEP_FILE).is_file()


def read_sweep(directory: Path) -> SweepResults:
    """A sweep's cells with the results of those that are done.

    Raises:
        ValueError: there is no sweep.json, or it cannot be read.
    """
    file = directory / SWEEP_FILE
    if not file.is_file():
        raise ValueError(f"{str(directory)!r} holds no {SWEEP_FILE}: it is not a sweep.")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        schema, recipe = values["schema"], dict(values["recipe"])
        cells = [{key: cell[key] for key in _KEYS} for cell in values["cells"]]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{str(file)!r} is not the record of a sweep: {error!r}") from None
    if schema != SCHEMA:
        raise ValueError(
            f"{str(file)!r} has schema {schema!r}; this version of fusedacl reads {SCHEMA}."
        )
    if not cells:
        raise ValueError(f"{str(file)!r} has no cells: there is nothing to report.")
    runs = tuple(_run(directory, cell) for cell in cells)
    return SweepResults(directory, recipe, runs, dict(values.get("environment") or {}))


def _run(sweep: Path, cell: Mapping[str, Any]) -> SweepRun:
    directory = sweep / cell["directory"]
    results, problem = None, None
    if cell["status"] == "done":
        results, problem = _results(directory)
    elif cell["error"]:
        # The places of the machine where it ran are of no use to a reader.
        error = str(cell["error"]).replace(f"{sweep.resolve()}/", "").replace(f"{sweep}/", "")
        problem = f"{cell['status']}: {error}"
    else:
        problem = str(cell["status"])
    return SweepRun(
        task=str(cell["task"]),
        method=str(cell["method"]),
        seed=int(cell["seed"]),
        grid=tuple(dict(cell["grid"] or {}).items()),
        directory=directory,
        problem=problem,
        results=results,
    )


def _results(directory: Path) -> tuple[dict[str, Any] | None, str | None]:
    """A run's results, or why there are none."""
    try:
        results = json.loads((directory / "results.json").read_text(encoding="utf-8"))
        for by_layer in results["metrics"].values():
            for layer, metrics in by_layer.items():
                int(layer), metrics.items()
        results["options"].items()
    except FileNotFoundError:
        return None, "its results.json is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, "its results.json is damaged"
    return results, None
