"""Figures of what runs logged: loss curves, and histograms of gradient angles."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..experiments.runs import OBJECTIVE_NAMES, read_metrics
from ..runtime.plots import legend_below, look, new_figure, panels, plain, save_figure

_SMOOTHED_STEPS = 15


def draw_loss_curves(runs: Mapping[str, Path], path: Path) -> Path:
    """Training and validation cross-entropy of runs (objective -> directory) by epoch, as a PNG."""
    figure = new_figure(7, 4.2)
    axes = figure.subplots()
    for index, (objective, run) in enumerate(runs.items()):
        name, color = OBJECTIVE_NAMES[objective], look(index)["color"]
        records = read_metrics(run)
        steps = [record for record in records if record["split"] == "train"]
        epochs = np.array([record["epoch"] for record in steps])
        losses = np.array([record["loss_ce"] for record in steps])
        axes.plot(epochs, losses, color=color, alpha=0.2, linewidth=0.8)
        width = min(_SMOOTHED_STEPS, len(losses))
        smoothed = np.convolve(losses, np.full(width, 1 / width), mode="valid")
        axes.plot(epochs[width - 1 :], smoothed, color=color, label=f"{name}, training")
        evaluations = [record for record in records if record["split"] != "train"]
        last = max((record["exit"] for record in evaluations), default=None)
        points = [r for r in evaluations if r["exit"] == last]
        if points:
            values = [record["metrics"]["loss"] for record in points]
            label = f"{name}, {points[0]['split']}"
            axes.plot([r["epoch"] for r in points], values, "o--", color=color, label=label)
    axes.set(xlabel="epoch", ylabel="cross-entropy (nats)", ylim=(0, None))
    axes.set_title(f"Cross-entropy; thick lines: mean of {_SMOOTHED_STEPS} steps")
    axes.legend(frameon=False)
    plain(axes)
    figure.savefig(path, dpi=150)
    return path


def logged_angles(run: Path) -> list[tuple[str, float, float]]:
    """Group of parameters ("model", "exit 3", …), epoch and angle in degrees of each decision.

    Raises:
        ValueError: the directory has no metrics.jsonl.
    """
    # "angle_degrees", "angle_degrees exit 3"; angle_degrees_all is compared with these.
    return [
        (
            name.removeprefix("angle_degrees").strip() or "model",
            float(record["epoch"]),
            float(value),
        )
        for record in read_metrics(run)
        for name, value in record.items()
        if name.split(" ")[0] == "angle_degrees"
        and isinstance(value, int | float)
        and math.isfinite(value)
    ]


def by_layer(names: Iterable[str]) -> list[str]:
    """Names that end in a number ("exit 3") by that number, then the others in their order."""

    def number(name: str) -> int:
        last = name.rpartition(" ")[2]
        return int(last) if last.isdigit() else 10**6

    return sorted(names, key=number)


def draw_angle_histogram(run: Path, path: Path, max_angle: float = 90.0) -> Path:
    """Angles that a run logged, by epoch, as a PNG (and SVG beside it).

    Raises:
        ValueError: the run logged no angle.
    """
    by_epoch: dict[str, list[float]] = {}
    for _, epoch, angle in logged_angles(run):
        by_epoch.setdefault(f"epoch {math.ceil(epoch)}", []).append(angle)
    if not by_epoch:
        raise ValueError(f"{str(run)!r} logged no gradient angle: it ran without the gate.")
    angles = [angle for of_epoch in by_epoch.values() for angle in of_epoch]
    title = f"{len(angles)} angles, {angle_words(angles, max_angle)}"
    return draw_angles({title: by_epoch}, [max_angle], path.with_suffix(""), height=4.2)[0]


def angle_words(angles: Sequence[float], limit: float) -> str:
    """Median, and the share beyond a limit: "median 63°, 4.2% beyond 90°"."""
    share = (np.asarray(angles) > limit).mean()
    return f"median {np.median(angles):.0f}°, {share:.1%} beyond {limit:g}°"


def draw_angles(
    drawn: Mapping[str, Mapping[str, Sequence[float]]],
    limits: Sequence[float],
    path: Path,
    *,
    bin_degrees: float = 5.0,
    height: float = 2.7,
    label: str = "angle (degrees)",
    counted: str = "steps",
) -> list[Path]:
    """Histograms of angles, panel title -> series -> degrees: `path`.png and .svg.

    limits: angle of the dashed line of each panel; label: that of the horizontal axis; counted:
    what the shares on the vertical axis are shares of.
    """
    figure, every = panels(list(drawn), height, label, title_size=9)
    series = by_layer(dict.fromkeys(name for found in drawn.values() for name in found))
    angles = np.concatenate([values for found in drawn.values() for values in found.values()])
    low = bin_degrees * math.floor(min(float(angles.min()), 60.0) / bin_degrees)
    high = bin_degrees * math.ceil(max(float(angles.max()), 100.0) / bin_degrees)
    bins = np.arange(low, high + bin_degrees / 2, bin_degrees)
    handles: dict[str, Any] = {}
    for index, (axes, found) in enumerate(zip(every, drawn.values(), strict=True)):
        for name, values in found.items():
            number = series.index(name)
            # Shares, because series may have different numbers of steps.
            heights = 100 * np.histogram(values, bins)[0] / len(values)
            color = look(number)["color"]
            handles[name] = axes.stairs(heights, bins, color=color, linewidth=1.5)
            handles[name].set_gid(f"series-{number}-{index}")
        axes.axvline(limits[index], color="#000000", linestyle="--", linewidth=0.9)
        axes.set_xlim(low, high)
    every[0].set_ylabel(f"{counted} (%)")
    legend_below(figure, [handles[name] for name in series], series)
    return save_figure(figure, path)
