"""Figures and tables of quality against speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...model.exit_policies import Policy
from ...runtime.plots import require_matplotlib
from ...runtime.text import markdown_table, write_tables
from .search import AREA_WORDS, SweepRow, frontier
from .timing import MeasuredSpeed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIGURE_SUFFIXES = (".png", ".svg")
# Told apart in grey and by those who see few colours: a colour and a marker each.
_LOOKS: dict[str, tuple[str, str]] = {
    "max_probability": ("#0072b2", "o"),
    "entropy": ("#e69f00", "s"),
    "patience": ("#009e73", "^"),
    "patience_confidence": ("#cc79a7", "D"),
    "voting": ("#56b4e9", "v"),
    "learned": ("#d55e00", "P"),
    "fixed_layer": ("#777777", "x"),
}
_INTEGER_POLICIES = ("patience", "voting", "fixed_layer")


def draw_quality_speed(
    curves: Mapping[str, Sequence[SweepRow]],
    full_score: float,
    metric: str,
    path: Path,
    measured: Mapping[Policy, Sequence[MeasuredSpeed]] | None = None,
) -> list[Path]:
    """Quality against speed of each policy, as `path`.png and .svg.

    The first panel: score against operations of the best settings. Where some were timed, one more
    a batch size: score against speed-up. The full model is a star; where it loses 1 % is a line.

    Args:
        curves: policy name -> its rows.
        measured: wall-clock of the settings that were timed.

    Raises:
        ValueError: there is no row, or matplotlib is not installed.
    """
    if not any(curves.values()):
        raise ValueError("curves is empty: sweep a policy first.")
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    measured = measured or {}
    sizes = _batch_sizes(measured)
    width = 4.2 * (1 + len(sizes)) if sizes else 7.2
    figure = Figure(figsize=(width, 4.9), layout="constrained")
    first, *others = figure.subplots(1, 1 + len(sizes), sharey=True, squeeze=False)[0]
    shares = {
        name: [(row.flops_share, row.score) for row in frontier(rows)]
        for name, rows in curves.items()
    }
    _draw_panel(first, shares, full_score)
    first.set_xlim(left=0)
    first.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    first.set_xlabel("operations per text (% of the full model's FLOPs)")
    first.set_ylabel(metric.replace("_", " "))
    for size, axes in zip(sizes, others, strict=True):
        speedups = {
            name: [
                (speed.speedup, row.score)
                for row in sorted(rows, key=lambda row: row.flops_share)
                for speed in measured.get(row.policy, ())
                if speed.batch_size == size
            ]
            for name, rows in curves.items()
        }
        _draw_panel(axes, speedups, full_score)
        axes.xaxis.set_major_formatter("{x:g}x")
        axes.set_xlabel(f"measured speed, batch {size} (full model: 1x)")
    figure.suptitle("Quality and speed of early exit")
    # Below the axes: curves may lie anywhere in them.
    handles, labels = first.get_legend_handles_labels()
    columns = round(width / 2.4)
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=columns)
    written = [path.with_name(path.name + suffix) for suffix in FIGURE_SUFFIXES]
    for file in written:
        figure.savefig(file, dpi=150)
    return written


def _draw_panel(
    axes: Axes, lines: Mapping[str, Sequence[tuple[float, float]]], full_score: float
) -> None:
    """Policy name -> its points, beside the full model at 1."""
    for name, points in lines.items():
        color, marker = _LOOKS[name]
        axes.plot(
            [x for x, _ in points],
            [score for _, score in points],
            color=color,
            marker=marker,
            markersize=4.5,
            # Dotted: there is nothing between two settings, where a threshold can be anything.
            linestyle=":" if name in _INTEGER_POLICIES else "-",
            linewidth=1.4,
            label=name.replace("_", " "),
        )
    axes.plot(
        1,
        full_score,
        marker="*",
        markersize=14,
        color="black",
        linestyle="",
        zorder=3,
        label="full model",
    )
    axes.axhline(
        full_score - 0.01 * abs(full_score),
        color="black",
        linewidth=0.8,
        linestyle="--",
        label="1 % below the full model",
    )
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _batch_sizes(measured: Mapping[Policy, Sequence[MeasuredSpeed]]) -> list[int]:
    return sorted({speed.batch_size for speeds in measured.values() for speed in speeds})


def write_speed_tables(
    curves: Mapping[str, Sequence[SweepRow]],
    areas: Mapping[str, float],
    metric: str,
    path: Path,
    measured: Mapping[Policy, Sequence[MeasuredSpeed]] | None = None,
) -> list[Path]:
    """Sweeps as `path`.csv and .md: policy, parameters, score, mean layer, FLOPs, times.

    Args:
        curves: policy name -> its rows.
        areas: policy name -> its area under the curve; a column of the CSV, where each row has to
            stand alone, a table of its own on the page.
        measured: wall-clock of the settings that were timed; empty cells at the others.
    """
    measured = measured or {}
    sizes = _batch_sizes(measured)
    header = ["policy", "parameters", metric, "mean_layer", "flops_share"]
    num_facts = len(header)
    for size in sizes:
        header += [f"ms_per_text_batch_{size}", f"speedup_batch_{size}"]
    table, numbers = [], []
    for name, rows in curves.items():
        for row in rows:
            words = " ".join(f"{key}={value:.6g}" for key, value in row.policy.parameters.items())
            cells = [name, words, f"{row.score:.4f}", f"{row.mean_layer:.3f}"]
            cells.append(f"{row.flops_share:.4f}")
            speeds = {speed.batch_size: speed for speed in measured.get(row.policy, ())}
            for size in sizes:
                speed = speeds.get(size)
                cells += [f"{speed.early_ms:.3f}", f"{speed.speedup:.2f}"] if speed else ["", ""]
            table.append(cells)
            numbers.append([*cells[:num_facts], f"{areas[name]:.4f}", *cells[num_facts:]])
    of_policies = markdown_table(
        ["policy", "area under the curve"], [[name, f"{areas[name]:.4f}"] for name in curves]
    )
    intro = f"{of_policies}\n\nArea under the curve: {AREA_WORDS}.\n\nThe settings swept:"
    of_csv = [*header[:num_facts], "area_under_curve", *header[num_facts:]]
    return write_tables(path, header, table, intro, (of_csv, numbers))
