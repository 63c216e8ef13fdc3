"""Sentences on the results of a report, with differences and their uncertainty."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...experiments.results import Seeds
from .layer_scores import Curve, LayerScores


@dataclass(frozen=True)
class Comparison:
    """A difference of two means in points; noise: the sum of both standard deviations (n - 1).

    The noise is None if either has a single seed.
    """

    difference: float
    noise: float | None
    num_seeds: tuple[int, int]

    @property
    def is_clear(self) -> bool:
        """True if the difference exceeds the sum of the deviations."""
        return self.noise is not None and abs(self.difference) > self.noise

    @property
    def words(self) -> str:
        """ "+1.2 points (3 and 3 seeds; more than the sum of the standard deviations, 0.8)"."""
        first, second = self.num_seeds
        seeds = f"{first} and {second} seeds"
        if self.noise is None:
            return f"{self.difference:+.1f} points ({seeds}: no claim)"
        size = "more than" if self.is_clear else "within"
        return (
            f"{self.difference:+.1f} points ({seeds}; {size} the sum of the standard deviations, "
            f"{self.noise:.1f})"
        )


def compare(first: Sequence[float], second: Sequence[float]) -> Comparison:
    """Compare scores: fractions, one per seed."""
    noise = None
    if min(len(first), len(second)) > 1:
        noise = 100 * (statistics.stdev(first) + statistics.stdev(second))
    difference = 100 * (statistics.mean(first) - statistics.mean(second))
    return Comparison(difference, noise, (len(first), len(second)))


def layer_findings(scores: LayerScores, reference: str) -> str:
    """Compare the reference method with the best other one: all exits, lower half, each layer."""
    ours, other = _rivals(scores, reference)
    if ours is None or other is None:
        return ""
    whole = compare(ours.averages, other.averages)
    sentences = [
        f"Averaged over the exits, {ours.label} has {100 * statistics.mean(ours.averages):.1f} and "
        f"the best other method, {other.label}, {100 * statistics.mean(other.averages):.1f}: "
        f"{whole.words}."
    ]
    layers = [layer for layer in sorted(ours.scores) if layer in other.scores]
    shallow = layers[: len(layers) // 2]
    if shallow:
        half = compare(_averages(ours, shallow), _averages(other, shallow))
        place = f"layer {shallow[0]}" if len(shallow) == 1 else f"layers {_span(shallow)}"
        sentences.append(f"On {place}: {half.words}.")
    rivals = [curve for curve in scores.curves if curve is not ours]
    first_at = [
        layer
        for layer in sorted(ours.scores)
        if all(
            statistics.mean(ours.scores[layer]) > statistics.mean(curve.scores[layer])
            for curve in rivals
            if layer in curve.scores
        )
    ]
    sentences.append(
        f"{ours.label} has the highest mean at {len(first_at)} of {len(ours.scores)} exits."
    )
    return " ".join(sentences)


def overall_finding(of_tasks: Mapping[str, LayerScores], reference: str) -> str:
    """The tasks on which the reference leads the average over the exits, and the others."""
    ahead, clear, behind = [], [], []
    label = reference
    for task, scores in of_tasks.items():
        ours, other = _rivals(scores, reference)
        if ours is None or other is None:
            continue
        label = ours.label
        found = compare(ours.averages, other.averages)
        if found.difference > 0:
            ahead.append(task)
            clear += [task] if found.is_clear else []
        else:
            behind.append(f"{task} ({other.label}, {found.difference:+.1f} points)")
    total = len(ahead) + len(behind)
    if not total:
        return ""
    words = (
        f"{label} has the highest score averaged over the exits on {len(ahead)} of {total} "
        f"task{'s' if total > 1 else ''}"
    )
    if ahead:
        sure = ", ".join(clear) if clear else "none of them"
        words += f" ({', '.join(ahead)}), by more than the sum of the standard deviations on {sure}"
    return f"{words}; another method leads on {', '.join(behind)}." if behind else f"{words}."


def table_finding(what: str, reference: str, rows: Mapping[str, Mapping[str, Seeds]]) -> str:
    """Compare each row with the reference; rows: row -> task -> scores."""
    base = rows[reference]
    parts = []
    for label, of_row in rows.items():
        found = [
            compare(list(seeds.values.values()), list(base[task].values.values()))
            for task, seeds in of_row.items()
            if label != reference and seeds and base[task]
        ]
        if not found:
            continue
        mean = statistics.mean(comparison.difference for comparison in found)
        clear = [comparison for comparison in found if comparison.is_clear]
        higher = sum(comparison.difference > 0 for comparison in clear)
        lower = len(clear) - higher
        number = f"{len(found)} task{'s' if len(found) > 1 else ''}"
        if len(found) < len(of_row):
            number += f" of {len(of_row)}"
        sure = f"{higher} clearly higher, {lower} clearly lower"
        single = sum(comparison.noise is None for comparison in found)
        if single:
            sure = f"{sure}, {single} with single seeds: no claim"
        if single == len(found):
            sure = "single seeds, no claim"
        parts.append(f"{label} {mean:+.1f} ({number}: {sure})")
    if not parts:
        return ""
    return (
        f"{what} against {reference}, mean difference in points: {'; '.join(parts)}. Clearly: by "
        "more than the sum of the standard deviations."
    )


def _rivals(scores: LayerScores, reference: str) -> tuple[Curve | None, Curve | None]:
    """The curve of the reference, and the best other curve over the same layers."""
    ours = next((curve for curve in scores.curves if curve.label == reference), None)
    if ours is None:
        return None, None
    others = [
        curve
        for curve in scores.curves
        if curve is not ours and sorted(curve.scores) == sorted(ours.scores)
    ]
    return ours, max(others, key=lambda curve: statistics.mean(curve.averages), default=None)


def _averages(curve: Curve, layers: Sequence[int]) -> list[float]:
    columns = [curve.scores[layer] for layer in layers]
    return [statistics.mean(of_seed) for of_seed in zip(*columns, strict=True)]


def _span(layers: Sequence[int]) -> str:
    whole = list(range(layers[0], layers[-1] + 1))
    return (
        f"{layers[0]} to {layers[-1]}"
        if list(layers) == whole
        else ", ".join(str(layer) for layer in layers)
    )
