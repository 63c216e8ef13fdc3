"""Claims of a recipe ("ACL-CL beats 2ST on shallow exits"), compared with the runs' scores."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...experiments.report_plan import ClaimPlan
from ...experiments.results import Comparison, Seeds, SweepResults, SweepRun
from ...runtime.text import write_tables
from ..page.page import Section, Table

_RULES = (
    "Scores in percent (spreads in points), mean ± standard deviation (n - 1) over the seeds; "
    "difference in points between runs of the same seed, positive if it supports the claim, with "
    "its 95 % t interval; the claim holds, or its contrary, where the interval is on one side of "
    "0. Differences that are all equal say nothing of their spread: not clear."
)
_NUMBERS = [
    "claim", "better", "than", "task", "mean_better", "deviation_better", "mean_than",
    "deviation_than", "difference", "interval_low", "interval_high",
]  # fmt: skip


@dataclass(frozen=True)
class Evidence:
    """The scores that support or contradict a claim on a task: fractions, one per seed."""

    claim: ClaimPlan
    task: str
    better: Seeds
    than: Seeds

    @property
    def comparison(self) -> Comparison:
        """The difference, positive if it supports the claim: of spreads, the smaller is better."""
        found = self.better.compare(self.than)
        if self.claim.spread_over is None:
            return found
        return dataclasses.replace(found, difference=-found.difference)

    @property
    def verdict(self) -> str:
        """ "holds", "the contrary", "not clear" or "one seed: no claim"."""
        if self.comparison.half_width is None:
            return "one seed: no claim"
        if not self.comparison.is_clear:
            return "not clear"
        return "holds" if self.comparison.difference > 0 else "the contrary"

    @property
    def cells(self) -> list[str]:
        """The row of the table, in percent and points."""
        found = self.comparison
        scores = [self.better.words, self.than.words]
        return [self.task, *scores, f"{found.difference:+.1f}", found.interval, self.verdict]

    @property
    def numbers(self) -> list[str]:
        """The row of the CSV file, as fractions."""
        found = self.comparison
        values = [self.better.mean, self.better.deviation, self.than.mean, self.than.deviation]
        values.append(found.difference / 100)
        half = found.half_width
        bounds = [None] * 2 if half is None else [found.difference - half, found.difference + half]
        values += [None if bound is None else bound / 100 for bound in bounds]
        numbers = ["" if value is None else f"{value:.6f}" for value in values]
        return [self.claim.text, self.claim.better, self.claim.than, self.task, *numbers]


def weigh(
    sweep: SweepResults, claim: ClaimPlan, metric: str | None = None
) -> tuple[list[Evidence], list[str]]:
    """The evidence of each task on a claim, and notes on what is missing.

    Raises:
        ValueError: the runs do not report `metric`.
    """
    evidence, notes = [], []
    for task in sweep.tasks:
        found = sweep.metric(task, metric)
        methods = (claim.better, claim.than)
        planned = {run.method for run in sweep.runs if run.task == task}
        if found is None or not planned.issuperset(methods):
            continue
        layers = {
            tuple(sorted(run.layers()))
            for run in sweep.runs
            if run.task == task and run.method in methods and run.evaluated
        }
        if len(layers) > 1:
            words = " and ".join(", ".join(map(str, numbers)) for numbers in sorted(layers))
            notes.append(f"“{claim.text}” on {task}: not compared, exits on layers {words}.")
            continue
        sides = [_scores(sweep, task, method, claim, found) for method in methods]
        for method, seeds in zip(methods, sides, strict=True):
            notes += seeds.missing(method, task)
        if all(sides):
            evidence.append(Evidence(claim, task, *sides))
    return evidence, notes


def verdict_words(claim: ClaimPlan, evidence: Sequence[Evidence]) -> str:
    """A sentence: the tasks where the claim holds, where its contrary, and where neither does."""
    words = [
        f"{start} {', '.join(tasks)}"
        for verdict, start in (
            ("holds", "holds on"),
            ("the contrary", "the contrary is seen on"),
            ("not clear", "the difference is not clear on"),
            ("one seed: no claim", "a single seed, hence no claim, on"),
        )
        if (tasks := [of_task.task for of_task in evidence if of_task.verdict == verdict])
    ]
    return f"“{claim.text}”: {'; '.join(words) or 'no results yet'}."


def claims_section(
    sweep: SweepResults, claims: Sequence[ClaimPlan], metric: str | None, path: Path
) -> Section | None:
    """A table per claim with a row per task; also `path`.csv and .md. None if no run is done."""
    sentences, tables, rows, numbers, notes = [], [], [], [], []
    for claim in claims:
        evidence, missing = weigh(sweep, claim, metric)
        notes += missing
        if not evidence:
            continue
        sentences.append(verdict_words(claim, evidence))
        header = ["task", claim.better, claim.than, "difference", "95 % interval", "verdict"]
        cells = [of_task.cells for of_task in evidence]
        tables.append(Table(header, cells, f"“{claim.text}”: {claim.measure}"))
        rows += [[claim.text, claim.better, claim.than, *row] for row in cells]
        numbers += [of_task.numbers for of_task in evidence]
    if not tables:
        return None
    notes = [*dict.fromkeys(notes), _RULES]
    scores = ["score of better", "score of than"]
    page_header = ["claim", "better", "than", "task", *scores, *header[3:]]
    files = write_tables(
        path, page_header, rows, "\n\n".join([*sentences, *notes]), (_NUMBERS, numbers)
    )
    return Section("Claims", " ".join(sentences), tables=tables, notes=notes, files=files)


def _scores(sweep: SweepResults, task: str, method: str, claim: ClaimPlan, metric: str) -> Seeds:
    """The scores of a method that the claim compares: means over exits, or their spreads."""

    def exit_mean(run: SweepRun) -> float:
        layers = sorted(run.layers())
        if claim.shallow:
            layers = layers[: max(1, len(layers) // 2)]
        return statistics.mean(run.score(metric, layer) for layer in layers)

    of_values = [sweep.seeds(task, method, grid, exit_mean) for grid in sweep.grids(method)]
    if claim.spread_over is None:
        return of_values[0]
    spreads: dict[int, float] = {}
    problems = {seed: why for seeds in reversed(of_values) for seed, why in seeds.problems.items()}
    for seed in dict.fromkeys(seed for seeds in of_values for seed in seeds.values):
        scores = [seeds.values[seed] for seeds in of_values if seed in seeds.values]
        if len(scores) == len(of_values):
            spreads[seed] = max(scores) - min(scores)
        else:
            problems.setdefault(seed, f"{len(scores)} of {len(of_values)} values")
    return Seeds(spreads, problems)
