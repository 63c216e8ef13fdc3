"""Figures and tables from the files that runs left."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .options import write_whole
from .tracking import read_records

OBJECTIVE_NAMES = {"ce": "CE", "scl": "CE+SCL", "acl": "ACL"}
_COLORS = {"ce": "#4c72b0", "scl": "#dd8452", "acl": "#55a868"}


def require_matplotlib() -> None:
    """Check that figures can be drawn, before any work.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("Figures need matplotlib. Run: pip install 'fusedacl[demo]'") from None


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


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell, the first to the left, the others to the right."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        first, *others = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join([first, *others]).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_tables(
    path: Path,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    words: str = "",
    numbers: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None,
) -> list[Path]:
    """A table as `path`.csv and `path`.md, the latter below `words`; returns both.

    `numbers`: header and rows of the CSV where they are not those of the page.
    """
    text = io.StringIO()
    of_csv = (header, rows) if numbers is None else numbers
    csv.writer(text, lineterminator="\n").writerows([of_csv[0], *of_csv[1]])
    files = [path.with_name(path.name + suffix) for suffix in (".csv", ".md")]
    write_whole(files[0], text.getvalue())
    intro = f"{words}\n\n" if words else ""
    write_whole(files[1], f"{intro}{markdown_table(header, rows)}\n")
    return files


def leader(scores: dict[str, list[float]]) -> str | None:
    """The best mean's name, if its lead exceeds the sum of both deviations and seeds repeat."""
    order = sorted(scores, key=lambda objective: -statistics.mean(scores[objective]))
    if len(order) < 2 or min(len(values) for values in scores.values()) < 2:
        return None
    first, second = scores[order[0]], scores[order[1]]
    lead = statistics.mean(first) - statistics.mean(second)
    return order[0] if lead > statistics.stdev(first) + statistics.stdev(second) else None
