"""Figures and tables of quality against speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...model.exit_policies import POLICIES, Policy
from ...runtime.plots import legend_below, look, new_figure, plain, require_matplotlib, save_figure
from ...runtime.text import markdown_table, write_tables
from .search import AREA_WORDS, SweepRow, frontier
from .timing import MeasuredSpeed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INTEGER_POLICIES = ("patience", "voting", "fixed_layer")


def draw_quality_speed(
    curves: Mapping[str, Sequence[SweepRow]],
    full_score: float,
    metric: str,
    path: Path,
    measured: Mapping[Policy, Sequence[MeasuredSpeed]] | None = None,
) -> list[Path]:
    """Quality against speed of each policy, as `path`.png and .svg.

    The first panel shows the best settings' scores against operations; if settings were timed, a
    panel per batch size shows scores against speed-up. The star is the full model, the dashed line
    a loss of 1 %.

    Args:
        curves: policy name -> its rows.
        measured: wall-clock times of the settings that were timed.

    Raises:
        ValueError: there is no row, or matplotlib is not installed.
    """
    if not any(curves.values()):
        raise ValueError("curves is empty: sweep a policy first.")
    require_matplotlib()
    from matplotlib.ticker import PercentFormatter

    measured = measured or {}
    sizes = _batch_sizes(measured)
    width = 4.2 * (1 + len(sizes)) if sizes else 7.2
    figure = new_figure(width, 4.9)
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
    legend_below(figure, *first.get_legend_handles_labels())
    return save_figure(figure, path)


def _draw_panel(
    axes: Axes, lines: Mapping[str, Sequence[tuple[float, float]]], full_score: float
) -> None:
    """Draw the points of each policy (its name -> them), and the full model at x = 1."""
    for name, points in lines.items():
        axes.plot(
            [x for x, _ in points],
            [score for _, score in points],
            **look(list(POLICIES).index(name)),
            markersize=4.5,
            # Dotted for integers, between which there are no settings.
            linestyle=":" if name in _INTEGER_POLICIES else "-",
            linewidth=1.4,
            label=name.replace("_", " "),
        )
    axes.plot(1, full_score, "k*", markersize=14, zorder=3, label="full model")
    limit = full_score - 0.01 * abs(full_score)
    axes.axhline(limit, color="k", lw=0.8, ls="--", label="1 % below the full model")
    plain(axes)


def _batch_sizes(measured: Mapping[Policy, Sequence[MeasuredSpeed]]) -> list[int]:
    return sorted({speed.batch_size for speeds in measured.values() for speed in speeds})


def write_speed_tables(
    curves: Mapping[str, Sequence[SweepRow]],
    areas: Mapping[str, float],
    metric: str,
    path: Path,
    measured: Mapping[Policy, Sequence[MeasuredSpeed]] | None = None,
) -> list[Path]:
    """Write the settings of all policies as `path`.csv and .md, with scores, FLOPs and times.

    Args:
        curves: policy name -> its rows.
        areas: policy name -> its area under the curve; a column of the CSV, and a table of its own
            in the Markdown file.
        measured: wall-clock times of the settings that were timed; other cells are empty.
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
    area_table = markdown_table(
        ["policy", "area under the curve"], [[name, f"{areas[name]:.4f}"] for name in curves]
    )
    intro = f"{area_table}\n\nArea under the curve: {AREA_WORDS}.\n\nThe settings tried:"
    csv_header = [*header[:num_facts], "area_under_curve", *header[num_facts:]]
    return write_tables(path, header, table, intro, (csv_header, numbers))
