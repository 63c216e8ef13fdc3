"""Figures and tables from the files that runs left."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..experiments.runs import OBJECTIVE_NAMES
from ..training.metrics_log import read_records

_COLORS = {"ce": "#4c72b0", "scl": "#dd8452", "acl": "#55a868"}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl.

    Raises:
        ValueError: the directory has none.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{str(run)!r} holds no metrics.jsonl: it is not a run of fusedacl.")
    return read_records(path)


def draw_loss_curves(runs: Mapping[str, Path], path: Path) -> Path:
    """Training and validation cross-entropy of several runs against the epoch, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for objective, run in runs.items():
        records = read_metrics(run)
        steps = [record for record in records if record["split"] == "train"]
        epochs = np.array([record["epoch"] for record in steps])
        losses = np.array([record["loss_ce"] for record in steps])
        name, color = OBJECTIVE_NAMES[objective], _COLORS[objective]
        axes.plot(epochs, losses, color=color, alpha=0.2, linewidth=0.8)
        axes.plot(*_running_mean(epochs, losses), color=color, label=f"{name}, training")
        evaluations = [record for record in records if record["split"] != "train"]
        last = max((record["exit"] for record in evaluations), default=None)
        evaluations = [record for record in evaluations if record["exit"] == last]
        if evaluations:
            axes.plot(
                [record["epoch"] for record in evaluations],
                [record["metrics"]["loss"] for record in evaluations],
                "o--",
                color=color,
                label=f"{name}, {evaluations[0]['split']}",
            )
    axes.set_xlabel("epoch")
    axes.set_ylabel("cross-entropy (nats)")
    axes.set_ylim(bottom=0)
    axes.set_title("Cross-entropy; thick: mean of 15 steps")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    return path


def _running_mean(x: np.ndarray, y: np.ndarray, width: int = 15) -> tuple[np.ndarray, np.ndarray]:
    width = min(width, len(y))
    return x[width - 1 :], np.convolve(y, np.full(width, 1 / width), mode="valid")


def draw_angle_histogram(run: Path, path: Path, max_angle: float = 90.0) -> Path:
    """Angles between the cross-entropy and the contrastive gradient, by epoch, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # One angle a step, or one for each exit and for what they share.
    logged = [
        (value, record["epoch"])
        for record in read_metrics(run)
        for name, value in record.items()
        if name.startswith("angle_degrees") and value is not None
    ]
    if not logged:
        raise ValueError(f"{str(run)!r} logged no gradient angle: it ran without the gate.")
    angles = np.array([angle for angle, _ in logged])
    epochs = np.ceil([epoch for _, epoch in logged]).astype(int)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    low = 5 * np.floor(angles.min() / 5)
    high = 5 * np.ceil(max(angles.max(), max_angle + 5) / 5)
    shades = np.linspace(0.85, 0.35, len(set(epochs)))
    axes.hist(
        [angles[epochs == epoch] for epoch in sorted(set(epochs))],
        bins=np.arange(low, high + 1, 2.5).tolist(),
        stacked=True,
        color=[(0.33 * s, 0.66 * s + 0.2, 0.41 * s + 0.2) for s in shades],
        label=[f"epoch {epoch}" for epoch in sorted(set(epochs))],
    )
    axes.axvline(max_angle, color="#c44e52", linestyle="--", label=f"gate, {max_angle:g} degrees")
    dropped = (angles > max_angle).mean()
    axes.set_title(
        f"{len(angles)} angles, median {np.median(angles):.0f} degrees, {dropped:.1%} dropped"
    )
    axes.set_xlabel("angle between the cross-entropy and the contrastive gradient (degrees)")
    axes.set_ylabel("optimizer steps")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    return path
