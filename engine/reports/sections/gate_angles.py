"""What the gate saw while runs trained: angles between the two gradients, exit by exit."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...experiments.results import SweepRun
from ...runtime.plots import COLORS, legend_below, panels, plain, save_figure
from ...runtime.text import write_tables
from ..page.page import Figure, Section, Table
from ..run_figures import read_metrics

_PREFIX = "angle_degrees"
_BIN_DEGREES = 5.0


def gate_section(
    runs: Mapping[str, Sequence[SweepRun]], data: str, path: Path, title: str
) -> Section | None:
    """Histograms of the logged angles and a table of all of them: label -> runs, seeds together.

    Writes `path`.png, .svg, .csv, .md. None where no run had a gate.
    """
    gated = {
        label: kept
        for label, group in runs.items()
        if (kept := [run for run in group if run.results and run.results.get("gate")])
    }
    if not gated:
        return None
    notes = []
    drawn: dict[str, dict[str, np.ndarray]] = {}
    num_drawn: dict[str, int] = {}
    for label, group in gated.items():
        angles: dict[str, list[float]] = {}
        for run in group:
            try:
                for name, values in logged_angles(run.directory).items():
                    angles.setdefault(name, []).extend(values)
                num_drawn[label] = num_drawn.get(label, 0) + 1
            except ValueError:
                notes.append(f"No histogram of {label}, seed {run.seed}: it has no metrics.jsonl.")
        if angles:
            drawn[label] = {name: np.array(values) for name, values in _sorted(angles)}
    rows = [row for label, group in gated.items() for row in _rows(label, group)]
    header = ["method", "seeds", "group", "steps", "median", "10 % to 90 %", "dropped"]
    words = (
        f"Angle between the gradients of the main and the contrastive loss on {data}, in degrees, "
        "at every step that the gate decided on. Deciles and median: means over epochs and seeds, "
        "weighed by steps; dropped: steps without the contrastive term."
    )
    tables = write_tables(path, header, rows, "\n\n".join([words, *notes]))
    figures, files = [], list(tables)
    if drawn:
        limits = {label: _max_angle(group) for label, group in gated.items()}
        pictures = _draw(drawn, limits, path)
        files = [*pictures, *files]
        counts = ", ".join(f"{label} {num_drawn[label]}" for label in drawn)
        caption = (
            f"Angles logged during training on {data}, one histogram for each group of parameters; "
            f"seeds together ({counts}). Dashed: the gate's limit, beyond which the contrastive "
            "term is dropped."
        )
        figures = [Figure(pictures[1], caption)]
    return Section(
        title, figures=figures, tables=[Table(header, rows, words)], notes=notes, files=files
    )


def logged_angles(run: Path) -> dict[str, list[float]]:
    """Group of parameters ("model", "exit 3", …) -> the angles that metrics.jsonl holds, degrees.

    Raises:
        ValueError: the directory has no metrics.jsonl.
    """
    found: dict[str, list[float]] = {}
    for record in read_metrics(run):
        for name, value in record.items():
            if name.startswith(_PREFIX) and isinstance(value, int | float) and math.isfinite(value):
                group = name.removeprefix(_PREFIX).strip() or "model"
                found.setdefault(group, []).append(float(value))
    return found


def _sorted(groups: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Exits by their layers, then the others."""

    def place(item: tuple[str, Any]) -> tuple[int, str]:
        number = item[0].rpartition(" ")[2]
        return (int(number), "") if number.isdigit() else (10**6, item[0])

    return sorted(groups.items(), key=place)


def _max_angle(group: Sequence[SweepRun]) -> float:
    results = group[0].results
    return float((results or {"options": {}})["options"].get("max_angle", 90.0))


def _rows(label: str, runs: Sequence[SweepRun]) -> list[list[str]]:
    by_group: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        for row in (run.results or {})["gate"]:
            by_group.setdefault(row.get("group", "model"), []).append(row)
    rows = []
    for group, found in _sorted(by_group):
        steps = sum(row["steps"] for row in found)

        def weighed(name: str, found: list[dict[str, Any]] = found, steps: int = steps) -> float:
            return sum(row[name] * row["steps"] for row in found) / steps

        spread = f"{weighed('angle_p10'):.0f} to {weighed('angle_p90'):.0f}"
        share = f"{weighed('dropped_share'):.1%}"
        cells = [group, str(steps), f"{weighed('angle_median'):.0f}", spread, share]
        rows.append([label, str(len(runs)), *cells])
    return rows


def _draw(
    drawn: Mapping[str, Mapping[str, np.ndarray]], limits: Mapping[str, float], path: Path
) -> list[Path]:
    figure, every = panels(len(drawn), 2.7)
    groups = [name for name, _ in _sorted({n: 0 for found in drawn.values() for n in found})]
    angles = np.concatenate([values for found in drawn.values() for values in found.values()])
    low = _BIN_DEGREES * math.floor(min(float(angles.min()), 60.0) / _BIN_DEGREES)
    high = _BIN_DEGREES * math.ceil(max(float(angles.max()), 100.0) / _BIN_DEGREES)
    bins = np.arange(low, high + _BIN_DEGREES / 2, _BIN_DEGREES)
    handles: dict[str, Any] = {}
    for index, (axes, (label, found)) in enumerate(zip(every, drawn.items(), strict=True)):
        for name, values in found.items():
            number = groups.index(name)
            # Shares, because groups need not have had the same number of steps.
            heights = 100 * np.histogram(values, bins)[0] / len(values)
            handles[name] = axes.stairs(
                heights, bins, color=COLORS[number % len(COLORS)], linewidth=1.5
            )
            handles[name].set_gid(f"series-{number}-{index}")
        limit = limits[label]
        axes.axvline(limit, color="#000000", linestyle="--", linewidth=0.9)
        together = np.concatenate(list(found.values()))
        share = f"{(together > limit).mean():.1%} beyond {limit:g}°"
        axes.set_title(f"{label}\nmedian {statistics.median(together):.0f}°, {share}", fontsize=9)
        axes.set_xlim(low, high)
        axes.set_xlabel("angle (degrees)", fontsize=9)
        plain(axes)
    every[0].set_ylabel("steps (%)")
    legend_below(figure, [handles[name] for name in groups], groups)
    return save_figure(figure, path)
