"""Scores by method and task for the tables of a report."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from ...experiments.report_plan import Target
from ...experiments.results import Grid, Seeds, SweepResults, SweepRun, grid_label
from .score_figures import metric_words


@dataclass(frozen=True)
class Row:
    """A row: its printed label, and its method, grid point and exit (None: the last)."""

    label: str
    method: str
    grid: Grid
    layer: int | None = None


@dataclass(frozen=True)
class Column:
    """A metric of a task on a split; counts: whether the mean over tasks includes it.

    The main metric on the main split has the task as its label.
    """

    task: str
    split: str | None
    metric: str
    label: str
    counts: bool = True

    @property
    def is_main(self) -> bool:
        return self.label == self.task


@dataclass(frozen=True)
class TaskScores:
    """A score, or the reason for none, for every row and column."""

    rows: Sequence[Row]
    columns: Sequence[Column]
    scores: Mapping[tuple[str, str], Seeds]

    def __bool__(self) -> bool:
        return any(self.scores.values())

    def at(self, row: Row, column: Column) -> Seeds:
        return self.scores[row.label, column.label]

    @property
    def counted(self) -> list[Column]:
        """The columns in the mean over tasks."""
        return [column for column in self.columns if column.counts]

    @cached_property
    def leaders(self) -> set[tuple[str, str]]:
        """Row and column of the best scores whose lead over the second is clear.

        Every score of the column needs a deviation.
        """
        found = set()
        for column in self.columns:
            there = {row.label: seeds for row in self.rows if (seeds := self.at(row, column))}
            best, *others = sorted(there, key=lambda label: -there[label].mean) or [""]
            several = all(seeds.deviation is not None for seeds in there.values())
            if others and several:
                lead = there[best].compare(there[others[0]])
                # Over their common seeds the second may be the better one.
                if lead.is_clear and lead.difference > 0:
                    found.add((best, column.label))
        return found

    def counts(self, row: Row) -> str:
        """The number of seeds in a row: "3" or "2 to 3"."""
        numbers = sorted({len(self.at(row, column)) for column in self.columns})
        return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"

    def cell(self, row: Row, column: Column) -> str:
        """The score, with its number of seeds if these differ within the row."""
        seeds = self.at(row, column)
        if not seeds:
            return ""
        words = f"**{seeds.words}**" if (row.label, column.label) in self.leaders else seeds.words
        return words if self.counts(row).isdigit() else f"{words} ({len(seeds)})"

    def difference(self, row: Row, column: Column) -> str:
        """The difference to the first row, in points, over the seeds that both have."""
        seeds, reference = self.at(row, column), self.at(self.rows[0], column)
        if row is self.rows[0] or not seeds or not reference:
            return ""
        return f"{seeds.compare(reference).difference:+.1f}"

    def gain(self, row: Row) -> str:
        """The mean of the differences on the counted tasks, if both rows have scores on all."""
        pairs = [(self.at(row, column), self.at(self.rows[0], column)) for column in self.counted]
        if row is self.rows[0] or not pairs or not all(map(all, pairs)):
            return ""
        found = [seeds.compare(reference).difference for seeds, reference in pairs]
        return f"{statistics.mean(found):+.1f}"

    def over_tasks(self, row: Row) -> str:
        """The mean over the counted tasks if all have scores, in percent.

        It has a deviation if all tasks have the same seeds.
        """
        of_tasks = [self.at(row, column) for column in self.counted]
        if not of_tasks or not all(of_tasks):
            return ""
        mean = statistics.mean(seeds.mean for seeds in of_tasks)
        if len({tuple(seeds.values) for seeds in of_tasks}) > 1:
            return f"{100 * mean:.1f}"
        by_seed = zip(*(seeds.values.values() for seeds in of_tasks), strict=True)
        return Seeds(dict(enumerate(map(statistics.mean, by_seed)))).words

    def notes(self) -> list[str]:
        """Notes on missing scores, and on their effect on the means over tasks."""
        found: dict[str, None] = {}
        for row, column in itertools.product(self.rows, self.columns):
            found |= dict.fromkeys(self.at(row, column).missing(row.label, column.task))
        notes = list(found)
        for row in self.rows if len(self.counted) > 1 else []:
            of_tasks = {column.label: self.at(row, column) for column in self.counted}
            absent = ", ".join(label for label, seeds in of_tasks.items() if not seeds)
            if absent:
                notes.append(f"{row.label} has no mean of tasks: nothing on {absent}.")
            elif len({tuple(seeds.values) for seeds in of_tasks.values()}) > 1:
                words = "the tasks have different seeds, so the mean of tasks has no deviation."
                notes.append(f"{row.label}: {words}")
        return notes

    def by_row(self) -> dict[str, dict[str, Seeds]]:
        """Row -> task -> scores on its main split."""
        main = [column for column in self.columns if column.is_main]
        return {
            row.label: {column.task: self.at(row, column) for column in main} for row in self.rows
        }

    def metrics(self) -> str:
        """ "F1 on mrpc; accuracy on rte, sst2"."""
        tasks: dict[str, list[str]] = {}
        for column in self.columns:
            if column.is_main:
                tasks.setdefault(metric_words(column.metric), []).append(column.task)
        return "; ".join(f"{metric} on {', '.join(names)}" for metric, names in tasks.items())

    def numbers(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of a CSV file with a row per score, as a fraction."""
        header = ["method", "task", "split", "metric", "seeds", "mean", "standard_deviation"]
        rows = []
        for row, column in itertools.product(self.rows, self.columns):
            seeds = self.at(row, column)
            names = [row.label, column.task, column.split or "", column.metric]
            mean = f"{seeds.mean:.6f}" if seeds else ""
            deviation = "" if seeds.deviation is None else f"{seeds.deviation:.6f}"
            rows.append([*names, " ".join(map(str, seeds.values)), mean, deviation])
        return header, rows


def rows_of(sweep: SweepResults, targets: Mapping[str, Target]) -> list[Row]:
    """The rows of some methods, one per grid point."""
    return [
        Row(grid_label(label, grid), target.method, grid, target.layer)
        for label, target in targets.items()
        for grid in sweep.grids(target.method)
    ]


def finished(sweep: SweepResults, task: str, row: Row) -> list[SweepRun]:
    """The runs of a row on a task that were evaluated."""
    return [run for run in sweep.of(task, row.method, row.grid) if run.evaluated]


def planned_tasks(sweep: SweepResults, rows: Sequence[Row]) -> dict[str, list[str]]:
    """Task -> labels of the rows that the sweep runs on it, for tasks with any."""
    planned = {
        task: [row.label for row in rows if sweep.of(task, row.method, row.grid)]
        for task in sweep.tasks
    }
    return {task: labels for task, labels in planned.items() if labels}


def common_tasks(sweep: SweepResults, rows: Sequence[Row]) -> list[str]:
    """The tasks on which the sweep runs every row."""
    planned = planned_tasks(sweep, rows)
    return [task for task, labels in planned.items() if len(labels) == len(rows)]


def main_columns(sweep: SweepResults, tasks: Sequence[str], metric: str | None) -> list[Column]:
    """A column for the main metric of each task with a finished run.

    Raises:
        ValueError: a task's runs do not report `metric`.
    """
    found = {task: sweep.metric(task, metric) for task in tasks}
    return [Column(task, None, name, task) for task, name in found.items() if name is not None]


def collect(
    sweep: SweepResults,
    rows: Sequence[Row],
    columns: Sequence[Column],
    read: Callable[[Row, Column, SweepRun], float],
) -> TaskScores:
    """The value of `read` for each run, by row and column."""
    scores = {}
    for row, column in itertools.product(rows, columns):
        seeds = sweep.seeds(column.task, row.method, row.grid, partial(read, row, column))
        scores[row.label, column.label] = seeds
    return TaskScores(rows, columns, scores)
