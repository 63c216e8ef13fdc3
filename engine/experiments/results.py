"""Results of a sweep: its cells, their scores, and the reasons for missing scores."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from ..runtime.text import did_you_mean
from ..training.storage.checkpoint import RESULTS_FILE
from .runs import read_results, run_label

SWEEP_FILE = "sweep.json"
SCHEMA = 1
Grid = tuple[tuple[str, Any], ...]
Value = TypeVar("Value")
# Options in which seeds of one experiment may differ: a first stage, a cache and the texts that are
# drawn or held out belong to a seed.
_SEED_OPTIONS = ("seed", "stage1_model", "feature_cache", "subset_seed")
# Half-width of an interval, in points, up to which all differences count as equal.
_EQUAL_POINTS = 1e-9
_KEYS = ("task", "method", "seed", "grid", "directory", "status", "seconds", "error")


class NotThereError(Exception):
    """A run has no such score; the message gives the reason."""


@dataclass(frozen=True)
class SweepRun:
    """A cell of a sweep: a task, a method, values of its grid and a seed."""

    task: str
    method: str
    seed: int
    grid: Grid
    directory: Path
    # Reason for missing results, which are then empty; None if there are results.
    problem: str | None
    results: Mapping[str, Any]

    @property
    def label(self) -> str:
        """Method and grid values: "CE+SCL sweep, aux_weight 0.1"."""
        return grid_label(self.method, self.grid)

    @property
    def evaluated(self) -> dict[str, Any]:
        """Split -> layer, as text -> metrics; empty if the run is not done."""
        return self.results.get("metrics", {})

    @property
    def options(self) -> dict[str, Any]:
        """The options of `fusedacl train`; empty if the run is not done."""
        return self.results.get("options", {})

    @property
    def gate(self) -> list[dict[str, Any]]:
        """A row per epoch and group of parameters; empty without a gate, or if not done."""
        return self.results.get("gate") or []

    def layers(self, split: str | None = None) -> dict[int, dict[str, Any]]:
        """Layer -> metrics on a split, the first split by default.

        Raises:
            NotThereError: the run is not done, or has no such split.
        """
        if self.problem is not None:
            raise NotThereError(self.problem)
        name = next(iter(self.evaluated), None) if split is None else split
        if name not in self.evaluated:
            raise NotThereError("it was not evaluated" + (f" on {split}" if split else ""))
        return {int(layer): metrics for layer, metrics in self.evaluated[name].items()}

    def score(self, metric: str, layer: int | None = None, split: str | None = None) -> float:
        """The score of an exit, the last by default, as a fraction.

        Raises:
            NotThereError: there is none, or it is not finite.
        """
        by_layer = self.layers(split)
        layer = max(by_layer) if layer is None else layer
        if layer not in by_layer:
            raise NotThereError(f"it has no exit on layer {layer}")
        value = by_layer[layer].get(metric)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise NotThereError(f"{metric} at layer {layer} is {value}")
        return float(value)

    def by_layer(self, metric: str) -> dict[int, float]:
        """Layer -> score of its exit; raises as `score`."""
        return {layer: self.score(metric, layer) for layer in self.layers()}

    def average(self, metric: str) -> float:
        """The mean score over all exits; raises as `score`."""
        return statistics.mean(self.by_layer(metric).values())


@dataclass(frozen=True)
class Comparison:
    """A mean difference in points, over the seeds that both have, and its 95 % t interval.

    Runs with the same seed share their data and the order of their batches, so differences are
    taken seed by seed. half_width: of the interval; None with fewer than two common seeds.
    """

    difference: float
    half_width: float | None
    num_pairs: int

    @property
    def has_spread(self) -> bool:
        """False if nothing is known of the spread: fewer than two differences, or all are equal.

        Scores of few texts are often equally far apart in two runs.
        """
        return self.half_width is not None and self.half_width > _EQUAL_POINTS

    @property
    def is_clear(self) -> bool:
        """True if there is a spread, and the interval does not contain 0."""
        return self.has_spread and abs(self.difference) > (self.half_width or 0.0)

    @property
    def interval(self) -> str:
        """ "+0.4 to +2.0", or empty without an interval."""
        if self.half_width is None:
            return ""
        low, high = self.difference - self.half_width, self.difference + self.half_width
        return f"{low:+.1f} to {high:+.1f}"

    @property
    def words(self) -> str:
        """ "+1.2 points (95 % interval of 3 pairs: +0.4 to +2.0)"."""
        if self.half_width is None:
            return f"{self.difference:+.1f} points (fewer than two common seeds: no claim)"
        return (
            f"{self.difference:+.1f} points (95 % interval of {self.num_pairs} pairs: "
            f"{self.interval})"
        )


@dataclass(frozen=True)
class Seeds:
    """Scores of a method on a task: seed -> score as a fraction, seed -> reason for none."""

    values: Mapping[int, float] = field(default_factory=dict)
    problems: Mapping[int, str] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        return statistics.mean(self.values.values())

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation (n - 1); None for a single seed."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    @property
    def words(self) -> str:
        """Mean and deviation in percent: "65.0 ± 7.1"; "65.0" for a single seed; else empty."""
        percent = [100 * value for value in self.values.values()]
        if len(percent) > 1:
            return f"{statistics.mean(percent):.1f} ± {statistics.stdev(percent):.1f}"
        return "".join(f"{value:.1f}" for value in percent)

    def compare(self, other: Seeds) -> Comparison:
        """The difference to other scores, over common seeds if there are any."""
        common = self.values.keys() & other.values.keys()
        pairs = [100 * (self.values[seed] - other.values[seed]) for seed in sorted(common)]
        if len(pairs) < 2:
            unpaired = 100 * (self.mean - other.mean)
            return Comparison(pairs[0] if pairs else unpaired, None, len(pairs))
        # SciPy's import takes half a second, which only reports need.
        from scipy.stats import t

        error = statistics.stdev(pairs) / math.sqrt(len(pairs))
        half_width = float(t.ppf(0.975, len(pairs) - 1)) * error
        return Comparison(statistics.mean(pairs), half_width, len(pairs))

    def missing(self, label: str, task: str) -> list[str]:
        """A sentence on the seeds of a method that have no score, if there are any."""
        by_reason: dict[str, list[str]] = {}
        for seed, reason in self.problems.items():
            by_reason.setdefault(reason, []).append(str(seed))
        words = "; ".join(
            f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)} ({reason})"
            for reason, seeds in by_reason.items()
        )
        return [f"Missing: {label} on {task}, {words}."] if words else []

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class SweepResults:
    """All cells of a sweep, in the order of its recipe."""

    directory: Path
    recipe: Mapping[str, Any]
    runs: tuple[SweepRun, ...]
    environment: Mapping[str, Any]

    @cached_property
    def tasks(self) -> list[str]:
        """Tasks with cells, in the order of the recipe."""
        return self._in_order("tasks", [run.task for run in self.runs])

    @cached_property
    def methods(self) -> list[str]:
        """Methods with cells, in the order of the recipe."""
        return self._in_order("methods", [run.method for run in self.runs])

    def _in_order(self, key: str, found: Sequence[str]) -> list[str]:
        named = [name for name in self.recipe.get(key, {}) if name in found]
        return list(dict.fromkeys([*named, *found]))

    @property
    def done(self) -> list[SweepRun]:
        """The runs with results."""
        return [run for run in self.runs if run.problem is None]

    def grids(self, method: str) -> list[Grid]:
        """The grid points of a method; a single empty one if it has no grid."""
        return list(dict.fromkeys(run.grid for run in self.runs if run.method == method))

    def of(self, task: str, method: str, grid: Grid = ()) -> list[SweepRun]:
        """The runs of a method on a task, one per seed."""
        wanted = (task, method, grid)
        return [run for run in self.runs if (run.task, run.method, run.grid) == wanted]

    def read(
        self, task: str, method: str, grid: Grid, read: Callable[[SweepRun], Value]
    ) -> tuple[dict[int, Value], dict[int, str]]:
        """The value of `read` for each seed of a method on a task, and the reasons for none."""
        values: dict[int, Value] = {}
        problems: dict[int, str] = {}
        for run in self.of(task, method, grid):
            try:
                values[run.seed] = read(run)
            except NotThereError as error:
                problems[run.seed] = str(error)
        return values, problems

    def seeds(self, task: str, method: str, grid: Grid, read: Callable[[SweepRun], float]) -> Seeds:
        """As `read`, for scores."""
        return Seeds(*self.read(task, method, grid, read))

    def splits(self, task: str) -> list[str]:
        """Evaluation splits of a task, the main one first."""
        return list(self._evaluated(task))

    def metric(self, task: str, wanted: str | None = None) -> str | None:
        """The metric of a task: `wanted`, or the first that its runs report; None if none is done.

        Raises:
            ValueError: its runs do not report `wanted`.
        """
        names = self.metrics(task)
        if names and wanted is not None and wanted not in names:
            raise ValueError(
                f"metric={wanted!r} is not among the metrics of {task}."
                f"{did_you_mean(wanted, names)}"
            )
        return (wanted or names[0]) if names else None

    def metrics(self, task: str) -> list[str]:
        """The metrics that the runs of a task report, the main one first; empty if none is done."""
        for by_layer in self._evaluated(task).values():
            for metrics in by_layer.values():
                return [name for name in metrics if name != "loss"]
        return []

    def _evaluated(self, task: str) -> dict[str, Any]:
        evaluated = (run.evaluated for run in self.done if run.task == task)
        return next(filter(None, evaluated), {})


def grid_value(value: Any) -> Any:
    """A value of a grid, as a number if it is one; YAML reads 1e-4 as text, 0.0001 as a number."""
    try:
        return value if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return str(value)


def grid_label(name: str, grid: Grid) -> str:
    """A name followed by the values of a grid point."""
    return ", ".join([name, *(f"{option} {value}" for option, value in grid)])


def is_sweep(path: Path) -> bool:
    """Return whether a directory is that of a sweep."""
    return (path / SWEEP_FILE).is_file()


def read_record(directory: Path) -> dict[str, Any]:
    """The contents of a sweep's sweep.json: `recipe`, `cells`, `environment`.

    Raises:
        ValueError: the file is missing, damaged, or of another version.
    """
    file = directory / SWEEP_FILE
    if not file.is_file():
        raise ValueError(f"{str(directory)!r} holds no {SWEEP_FILE}: it is not a sweep.")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        record = {
            "recipe": dict(values["recipe"]),
            "cells": [{key: cell[key] for key in _KEYS} for cell in values["cells"]],
            "environment": dict(values.get("environment") or {}),
        }
        schema = values["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(file)!r} is not the record of a sweep: {error!r}") from None
    if schema != SCHEMA:
        raise ValueError(
            f"{str(file)!r} has schema {schema!r}; this version of fusedacl reads {SCHEMA}."
        )
    return record


def read_sweep(directory: Path) -> SweepResults:
    """The cells of a sweep, with the results of those that are done.

    Raises:
        ValueError: as `read_record`, or there are no cells, or runs of one task were evaluated on
            different texts.
    """
    record = read_record(directory)
    if not record["cells"]:
        where = str(directory / SWEEP_FILE)
        raise ValueError(f"{where!r} has no cells: there is nothing to report.")
    runs = tuple(_run(directory, cell) for cell in record["cells"])
    for task in dict.fromkeys(run.task for run in runs):
        _check_same_texts([run for run in runs if run.task == task])
    return SweepResults(directory, record["recipe"], runs, record["environment"])


def _run(sweep: Path, cell: Mapping[str, Any]) -> SweepRun:
    directory = sweep / cell["directory"]
    results: dict[str, Any] = {}
    problem: str | None = str(cell["status"])
    if problem == "done":
        try:
            results, problem = read_results(directory), None
        except ValueError:
            is_there = (directory / RESULTS_FILE).is_file()
            problem = f"its {RESULTS_FILE} is {'damaged' if is_there else 'missing'}"
    elif cell["error"]:
        # Absolute paths of the machine that ran the sweep mean nothing to a reader.
        error = str(cell["error"]).replace(f"{sweep.resolve()}/", "").replace(f"{sweep}/", "")
        problem = f"{problem}: {error}"
    task, method, seed = str(cell["task"]), str(cell["method"]), int(cell["seed"])
    grid = tuple(dict(cell["grid"] or {}).items())
    return SweepRun(task, method, seed, grid, directory, problem, results)


def collect_runs(paths: Sequence[Path]) -> SweepResults:
    """Single runs on one data set as a sweep; runs that differ in the seed only are one method.

    Raises:
        ValueError: no run is named, a run has no results, or the runs do not belong together: other
            data or evaluated texts, or, under one name, other layers or options, or the same seed
            twice.
    """
    if not paths:
        raise ValueError("runs is empty: name the directories of some runs.")
    runs = []
    for number, path in enumerate(paths):
        results = read_results(path)
        method, seed = run_label(results["options"]), int(results["options"].get("seed", number))
        directory = path if path.is_dir() else path.parent
        runs.append(SweepRun(str(results["data"]), method, seed, (), directory, None, results))
    data = sorted({f"{run.task}, {', '.join(list(run.evaluated)[:1])}" for run in runs})
    if len(data) > 1:
        words = "runs on different data cannot share a figure"
        raise ValueError(f"{words}: {'; '.join(data)}. Make one report for each.")
    _check_same_texts(runs)
    first: dict[str, SweepRun] = {}
    of_seed: dict[tuple[str, int], SweepRun] = {}
    for run in runs:
        _check_same_method(first.setdefault(run.method, run), run)
        other = of_seed.setdefault((run.method, run.seed), run)
        if other is not run:
            raise ValueError(
                f"{str(other.directory)!r} and {str(run.directory)!r} ({run.method}) have the same "
                f"seed, {run.seed}, and would count as two: name one of them."
            )
    return SweepResults(Path("."), {}, tuple(runs), {})


def _check_same_texts(runs: Sequence[SweepRun]) -> None:
    """Refuse runs that were scored on different texts or labels with the same options.

    Held-out texts belong to a seed. Where options differ, the sections of the report warn.
    """
    first: dict[Any, tuple[SweepRun, Any]] = {}
    for run in runs:
        content = _evaluated_content(run)
        if content is None:
            continue
        held_out = run.options.get("validation_split_percentage")
        same = held_out, held_out and run.seed, run.options.get("max_eval_samples")
        other, theirs = first.setdefault(same, (run, content))
        if content != theirs:
            raise ValueError(
                f"{str(other.directory)!r} and {str(run.directory)!r} were evaluated on different "
                f"texts or labels ({theirs['rows']} and {content['rows']} rows), so their scores "
                "cannot be compared. Delete the runs on the old data and train them again, or make "
                "one report for each."
            )


def _evaluated_content(run: SweepRun) -> dict[str, Any] | None:
    """Rows and SHA-256 of the texts and labels that a run was scored on; None if not recorded."""
    try:
        config = json.loads((run.directory / "config.json").read_text(encoding="utf-8"))
        content = config["data_record"]["splits"][next(iter(run.evaluated))]
        # A record of an earlier version has no more.
        return {key: content[key] for key in ("rows", "texts", "labels")}
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return None


def _check_same_method(first: SweepRun, run: SweepRun) -> None:
    who = f"{str(run.directory)!r} ({run.method})"
    layers, others = (list(of.layers()) if of.evaluated else [] for of in (run, first))
    if layers != others:
        raise ValueError(
            f"{who} has exits on layers {layers}, another run with that name on {others}: they are "
            "not seeds of one experiment."
        )
    differing = [
        f"{name} {first.options[name]!r} and {value!r}"
        for name, value in run.options.items()
        if name not in _SEED_OPTIONS and name in first.options and first.options[name] != value
    ]
    if differing:
        raise ValueError(
            f"{who} is no seed of the same experiment as another run with that name: "
            f"{', '.join(differing)}."
        )
