"""The answer of a trial in words: what the contrastive term gains, what it costs, what was gated.

A term pays where the whole 95 % t interval of the differences, draw by draw, is above 0. It does
not pay where the whole interval is below the smallest gain that is worth its price, `min_gain`,
also where both are so.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from ..results import Comparison, SweepResults, SweepRun, read_sweep
from ..runs import read_metrics
from .setting import BASE, METHODS
from .trial import Trial, step_speeds

# More than anyone runs.
_MOST_DRAWS = 1000
# Points that a method must be above a constant answer to have learned anything.
_LEARNED_POINTS = 2.0


@dataclass(frozen=True)
class Verdict:
    """A method beside cross-entropy, over the draws of a trial.

    min_gain: in points. learned: False if no method did better than one answer to all texts.
    """

    method: str
    comparison: Comparison
    min_gain: float
    learned: bool = True

    @property
    def word(self) -> str:
        """ "pays", "does not pay" or "not clear"."""
        half, difference = self.comparison.half_width, self.comparison.difference
        if half is None or not self.comparison.has_spread or not self.learned:
            return "not clear"
        if difference + half < self.min_gain:
            return "does not pay"
        return "pays" if difference - half > 0 else "not clear"

    @property
    def draws_needed(self) -> int | None:
        """Draws after which the verdict is clear if mean and spread stay; None: over 1,000.

        Only for a comparison with an interval.
        """
        from scipy.stats import t

        half, number = self.comparison.half_width, self.comparison.num_pairs
        assert half is not None
        # The interval would leave out 0, or the smallest gain.
        wanted = max(self.comparison.difference, self.min_gain - self.comparison.difference)
        spread = half * math.sqrt(number) / float(t.ppf(0.975, number - 1))
        for draws in range(number + 1, _MOST_DRAWS + 1):
            if float(t.ppf(0.975, draws - 1)) * spread / math.sqrt(draws) < wanted:
                return draws
        return None

    def words(self, flags: Callable[[int], str]) -> str:
        """The verdict as a sentence, and what would make it clear.

        flags: the options that give a trial so many draws.
        """
        found = self.comparison
        gain = f"{self.method} over {BASE}: {found.difference:+.1f} points"
        if found.half_width is None:
            return (
                f"{gain} in a single draw, which has no interval: {self.word}. For a second one: "
                f"{flags(2)}."
            )
        start = f"{gain} (95 % interval {found.interval}, {found.num_pairs} draws): {self.word}"
        if not self.learned:
            return f"{start}, as nothing was learned."
        if not found.has_spread:
            return (
                f"{start}, as all draws have the same difference, which says nothing of the "
                f"spread. For another one: {flags(found.num_pairs + 1)}."
            )
        if self.word == "pays":
            return f"{start}."
        if self.word == "does not pay":
            clear = found.is_clear and found.difference > 0
            less = "There is a gain, but it" if clear else "The gain, if there is any,"
            return f"{start}. {less} is less than {self.min_gain:g} points."
        needed = self.draws_needed
        if needed is None:
            return f"{start}. With this spread more than {_MOST_DRAWS:,} draws would be needed."
        return f"{start}. If mean and spread stay, {needed} draws make it clear: {flags(needed)}."


def answer(trial: Trial, min_gain: float) -> list[str]:
    """The sentences of the answer, from the complete draws; empty if there are none.

    Raises:
        ValueError: the files of the runs are damaged.
    """
    if not trial.draws:
        return []
    whole = read_sweep(trial.directory)
    # The seeds of draws are 1, 2, …; one that was stopped is left out.
    complete = tuple(run for run in whole.runs if run.seed <= len(trial.draws))
    sweep = replace(whole, runs=complete)
    (task,) = sweep.tasks
    metric = sweep.metric(task)
    assert metric is not None  # a draw is complete
    scores = {
        name: sweep.seeds(task, name, (), partial(SweepRun.score, metric=metric))
        for name in METHODS
    }
    best = max(100 * seeds.mean for seeds in scores.values())
    constant = trial.setting.constant_score
    learned = constant is None or best > 100 * constant + _LEARNED_POINTS

    def flags(draws: int) -> str:
        seconds = trial.spent + (draws - len(trial.draws)) * trial.next_seconds
        words = f"--minutes {math.ceil(seconds / 60)}"
        return f"{words} --draws {draws}" if draws > trial.max_draws else words

    lines = [
        _setting_words(trial, task),
        f"{metric} in percent: "
        + ", ".join(f"{name} {seeds.words}" for name, seeds in scores.items())
        + ".",
    ]
    if not learned:
        lines.append(
            f"The same answer to all texts would score {100 * (constant or 0):.1f}: the runs have "
            "learned too little to be compared. Raise --learning_rate or --num_train_epochs."
        )
    for name in reversed(METHODS):
        if name != BASE:
            verdict = Verdict(name, scores[name].compare(scores[BASE]), min_gain, learned)
            lines.append(verdict.words(flags))
    return [*lines, _price_words(sweep), *_gate_words(sweep)]


def _setting_words(trial: Trial, task: str) -> str:
    size, setting, number = trial.size, trial.setting, len(trial.draws)
    texts = f"{size.num_texts:,} training texts"
    if size.per_class is not None:
        texts = (
            f"{size.num_texts:,} of {setting.num_train:,} training texts (at most {size.per_class} "
            "of each class)"
        )
    draws = "1 draw" if number == 1 else f"{number} draws"
    return (
        f"{task}: {draws} of {texts}, {size.num_steps} steps a run, evaluated on "
        f"{setting.num_evaluated:,} texts."
    )


def _price_words(sweep: SweepResults) -> str:
    """The ratio of the median times of a step, over all draws; batches are the same."""
    medians = {}
    for name in METHODS:
        runs = [run for run in sweep.done if run.method == name]
        medians[name] = statistics.median(v for run in runs for v in step_speeds(run.directory))
    parts = [
        f"a step of {name} {medians[BASE] / medians[name]:.2f} times"
        for name in reversed(METHODS)
        if name != BASE
    ]
    return f"Price: {', '.join(parts)} as long as one of {BASE}."


def _gate_words(sweep: SweepResults) -> list[str]:
    """A line on the share of dropped gradients and the mean logged angle; empty without a gate."""
    gated = [run for run in sweep.done if run.gate]
    steps = sum(row["steps"] for run in gated for row in run.gate)
    if not steps:
        return []
    dropped = sum(row["dropped_share"] * row["steps"] for run in gated for row in run.gate)
    words = f"The gate dropped {dropped / steps:.1%} of {steps:,} contrastive gradients"
    found = (record.get("angle_degrees") for run in gated for record in read_metrics(run.directory))
    angles = [float(angle) for angle in found if angle is not None]
    return [f"{words}; mean angle {statistics.mean(angles):.0f} degrees."]
