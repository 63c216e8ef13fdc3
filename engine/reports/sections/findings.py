"""Sentences on the results of a report, with differences and their uncertainty."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from ...experiments.results import Seeds
from .layer_scores import Curve, LayerScores


def layer_findings(scores: LayerScores, reference: str | None) -> str:
    """Compare the reference method with the best other one: all exits, lower half, each layer."""
    ours, other = _rivals(scores, reference)
    if ours is None or other is None:
        return ""
    whole, other_whole = ours.average(), other.average()
    sentences = [
        f"Averaged over the exits, {ours.label} has {100 * whole.mean:.1f} and the best other "
        f"method, {other.label}, {100 * other_whole.mean:.1f}: {whole.compare(other_whole).words}."
    ]
    layers = [layer for layer in sorted(ours.scores) if layer in other.scores]
    shallow = layers[: len(layers) // 2]
    if shallow:
        half = ours.average(shallow).compare(other.average(shallow))
        is_range = shallow == list(range(shallow[0], shallow[-1] + 1))
        span = f"{shallow[0]} to {shallow[-1]}" if is_range else ", ".join(map(str, shallow))
        place = f"layer {shallow[0]}" if len(shallow) == 1 else f"layers {span}"
        sentences.append(f"On {place}: {half.words}.")
    num_leads = 0
    for layer, seeds in ours.scores.items():
        curves = [curve for curve in scores.curves if curve is not ours and layer in curve.scores]
        num_leads += seeds.mean > max(curve.scores[layer].mean for curve in curves)
    sentences.append(
        f"{ours.label} has the highest mean at {num_leads} of {len(ours.scores)} exits."
    )
    return " ".join(sentences)


def overall_finding(of_tasks: Mapping[str, LayerScores], reference: str | None) -> str:
    """The tasks on which the reference leads the average over the exits, and the others."""
    ahead, clear, behind = [], [], []
    for task, scores in of_tasks.items():
        ours, other = _rivals(scores, reference)
        if ours is None or other is None:
            continue
        found = ours.average().compare(other.average())
        if found.difference > 0:
            ahead.append(task)
            clear += [task] if found.is_clear else []
        else:
            behind.append(f"{task} ({other.label}, {found.difference:+.1f} points)")
    total = len(ahead) + len(behind)
    if not total:
        return ""
    words = (
        f"{reference} has the highest score averaged over the exits on {len(ahead)} of {total} "
        f"task{'s' if total > 1 else ''}"
    )
    if ahead:
        sure = ", ".join(clear) or "none of them"
        words += f" ({', '.join(ahead)}), clearly on {sure}"
    return f"{words}; another method leads on {', '.join(behind)}." if behind else f"{words}."


def table_finding(what: str, reference: str, rows: Mapping[str, Mapping[str, Seeds]]) -> str:
    """Compare each row with the reference; rows: row -> task -> scores."""
    base = rows[reference]
    parts = []
    for label, of_row in rows.items():
        found = [
            seeds.compare(base[task])
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
        single = sum(comparison.half_width is None for comparison in found)
        sure = f"{higher} clearly higher, {lower} clearly lower"
        sure += f", {single} with single seeds: no claim" if single else ""
        if single == len(found):
            sure = "single seeds, no claim"
        parts.append(f"{label} {mean:+.1f} ({number}: {sure})")
    if not parts:
        return ""
    return (
        f"{what} against {reference}, mean difference in points: {'; '.join(parts)}. Clearly: the "
        "95 % interval of the paired differences does not contain 0."
    )


def _rivals(scores: LayerScores, reference: str | None) -> tuple[Curve | None, Curve | None]:
    """The curve of the reference, and the best other curve over the same layers."""
    ours = next((curve for curve in scores.curves if curve.label == reference), None)
    if ours is None:
        return None, None
    others = [
        curve
        for curve in scores.curves
        if curve is not ours and sorted(curve.scores) == sorted(ours.scores)
    ]
    return ours, max(others, key=lambda curve: curve.average().mean, default=None)
