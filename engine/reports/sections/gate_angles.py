"""Angles between the two gradients that the gate saw during training, exit by exit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...experiments.results import SweepRun
from ..page.page import Section, Table, write_section
from ..run_figures import angle_words, by_layer, draw_angles, logged_angles


def gate_section(
    runs: Mapping[str, Sequence[SweepRun]], data: str, path: Path, title: str
) -> Section | None:
    """Histograms and a table of the logged angles; runs: label -> seeds, which are pooled.

    Writes `path`.png, .svg, .csv, .md. None if no run had a gate.
    """
    gated = {
        label: kept for label, group in runs.items() if (kept := [run for run in group if run.gate])
    }
    if not gated:
        return None
    notes = []
    drawn: dict[str, dict[str, list[float]]] = {}
    num_drawn: dict[str, int] = {}
    for label, group in gated.items():
        angles: dict[str, list[float]] = {}
        for run in group:
            try:
                for name, _, angle in logged_angles(run.directory):
                    angles.setdefault(name, []).append(angle)
                num_drawn[label] = num_drawn.get(label, 0) + 1
            except ValueError:
                notes.append(f"No histogram of {label}, seed {run.seed}: it has no metrics.jsonl.")
        if angles:
            drawn[label] = {name: angles[name] for name in by_layer(sorted(angles))}
    rows = [row for label, group in gated.items() for row in _rows(label, group)]
    header = ["method", "seeds", "group", "steps", "median", "10 % to 90 %", "dropped"]
    words = (
        f"Angle between the gradients of the main and the contrastive loss on {data}, in degrees, "
        "at every step that the gate decided on. Deciles and median: means over epochs and seeds, "
        "weighted by steps; dropped: steps without the contrastive term."
    )
    caption = ""
    figures: list[Path] = []
    if drawn:
        limits = [float(gated[label][0].options.get("max_angle", 90.0)) for label in drawn]
        titles = {}
        for (label, found), limit in zip(drawn.items(), limits, strict=True):
            together = [angle for angles in found.values() for angle in angles]
            titles[f"{label}\n{angle_words(together, limit)}"] = found
        figures = draw_angles(titles, limits, path)
        counts = ", ".join(f"{label} {num_drawn[label]}" for label in drawn)
        caption = (
            f"Angles logged during training on {data}, one histogram for each group of parameters; "
            f"seeds together ({counts}). Dashed: the gate's limit, beyond which the contrastive "
            "term is dropped."
        )
    return write_section(path, title, Table(header, rows, words), figures, caption, notes)


def _rows(label: str, runs: Sequence[SweepRun]) -> list[list[str]]:
    by_group: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        for row in run.gate:
            by_group.setdefault(row.get("group", "model"), []).append(row)
    rows = []
    for group in by_layer(sorted(by_group)):
        found = by_group[group]
        steps = sum(row["steps"] for row in found)
        low, median, high, dropped = (
            sum(row[name] * row["steps"] for row in found) / steps
            for name in ("angle_p10", "angle_median", "angle_p90", "dropped_share")
        )
        cells = [group, str(steps), f"{median:.0f}", f"{low:.0f} to {high:.0f}", f"{dropped:.1%}"]
        rows.append([label, str(len(runs)), *cells])
    return rows
