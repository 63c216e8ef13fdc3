"""`fusedacl angles`: tables and figures of gradient angles (Figure 2 of arXiv 2602.03563)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...config.commands import AngleConfig
from ...experiments.runs import check_distinct, distinct_labels, method_of, run_config
from ...runtime.files import write_whole
from ...runtime.plots import (
    legend_below,
    look,
    mark,
    new_figure,
    plain,
    require_matplotlib,
    save_figure,
)
from ...runtime.text import text_table, write_tables
from ..page.page import CAPTION_SUFFIX, Section, write_page
from ..page.page import Figure as PageFigure
from .gradient_angles import RIGHT_ANGLE, AngleRecords, measure_angles

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.container import ErrorbarContainer

CSV_HEADER = (
    "run", "batch", "group", "angle_degrees", "cosine", "norm_ce", "norm_contrastive",
)  # fmt: skip
TABLE_HEADER = (
    "run", "parameters", "batches", "median", "10-90 %", "share > 90", "zero gradients",
)  # fmt: skip


def report_angles(runs: Sequence[Path], config: AngleConfig) -> tuple[str, list[Path]]:
    """Measure the angles of some runs and write tables and figures; a printable table, the files.

    Raises:
        ValueError: as `measure_angles`; `output_dir` or a label is missing; matplotlib is.
        FloatingPointError: as `measure_angles`.
    """
    if config.angles.output_dir is None:
        raise ValueError("output_dir is missing: name the directory for tables and figures.")
    require_matplotlib()
    check_distinct(runs)
    configs = [run_config(run) for run in runs]
    data = [str(given.data.task_name or given.data.dataset_name) for given in configs]
    methods = [method_of(given) for given in configs]
    labels = distinct_labels(runs, methods, data, config.angles.labels)
    records = [measure_angles(run, config, label) for run, label in zip(runs, labels, strict=True)]
    rows = angle_rows(records)
    files = write_angles(records, Path(config.angles.output_dir))
    return "\n".join([text_table(TABLE_HEADER, rows), "", *notes(records)]), files


def write_angles(records: Sequence[AngleRecords], output_dir: Path) -> list[Path]:
    """Table, figures and page: angles.*, angles_by_layer.*, index.html; returns the files.

    Both figures have their caption beside them, <name>.caption.txt.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    rows, words = angle_rows(records), "\n\n".join(notes(records))
    numbers = CSV_HEADER, _batch_rows(records)
    tables = write_tables(output_dir / "angles", TABLE_HEADER, rows, words, numbers)
    whole = draw_histograms(records, output_dir / "angles")
    by_layer = draw_by_layer(records, output_dir / "angles_by_layer")
    captions = (
        f"Angle between {_gradients(records)} over {_whole(records)} of trained models, by "
        f"training batch ({_data(records)}); dashed: medians. Parameters fixed, dropout off.",
        f"The same by part of the model: median and 10th to 90th percentile of the batches of "
        f"{_data(records)}.",
    )
    figures = []
    for (_, picture), caption in zip((whole, by_layer), captions, strict=True):
        write_whole(picture.with_name(f"{picture.stem}{CAPTION_SUFFIX}"), caption + "\n")
        figures.append(PageFigure(picture, caption))
    files = [*tables, *whole, *by_layer]
    page = write_page(
        output_dir / "index.html",
        "Gradient angles",
        [_finding(record) for record in records],
        [
            Section(
                "Gradient angles",
                figures=figures,
                tables=[(TABLE_HEADER, rows)],
                notes=notes(records),
                files=files,
            )
        ],
    )
    return [*files, page]


def angle_rows(records: Sequence[AngleRecords]) -> list[list[str]]:
    """The cells of `TABLE_HEADER`, a row for each run and each of its groups; degrees."""
    rows = []
    for record in records:
        for name in record.names:
            low, median, high = np.percentile(record.angles(name), (10, 50, 90))
            rows.append(
                [
                    record.label,
                    name,
                    str(record.num_batches),
                    f"{median:.1f}",
                    f"{low:.1f} to {high:.1f}",
                    f"{record.share_above(name):.1%}",
                    str(record.num_undefined(name)),
                ]
            )
    return rows


def notes(records: Sequence[AngleRecords]) -> list[str]:
    """What a reader of the numbers has to know, in sentences."""
    lines = [
        "Angle in degrees between the gradients of the cross-entropy and of the contrastive loss "
        "of one training batch; parameters fixed, dropout off, float32."
    ]
    lines += [f"{record.label}: {record.settings}." for record in records]
    for record in records:
        undefined = {name: record.num_undefined(name) for name in record.names}
        if any(undefined.values()):
            words = ", ".join(f"{name} {count}" for name, count in undefined.items() if count)
            lines.append(
                f"{record.label}: a gradient is zero, and the angle 90 by convention, in batches "
                f"of {record.num_batches}: {words}."
            )
        if record.num_single_class:
            lines.append(
                f"{record.label}: {record.num_single_class} of {record.num_batches} batches hold "
                "one class only."
            )
    return lines


def draw_histograms(records: Sequence[AngleRecords], path: Path) -> list[Path]:
    """The distribution of the angle over all parameters, one colour a run: `path`.png and .svg."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    angles = [record.angles(record.names[0]) for record in records]
    figure = new_figure(7.5, 4.6)
    axes = figure.subplots()
    bins = _bins(np.concatenate(angles)).tolist()
    handles, labels = [], []
    for index, (record, values) in enumerate(zip(records, angles, strict=True)):
        color = look(index)["color"]
        weights = np.full(len(values), 1 / len(values))
        filled: Any = axes.hist(
            values, bins, weights=weights, histtype="stepfilled", color=color, alpha=0.35
        )[2]
        # The outline stays visible where histograms lie on one another.
        outline: Any = axes.hist(
            values, bins, weights=weights, histtype="step", color=color, linewidth=1.4
        )[2]
        median = float(np.median(values))
        line = axes.axvline(median, color=color, linestyle="--", linewidth=1.2)
        mark(index, *filled, *outline, line)
        handles.append(filled[0])
        above = record.share_above(record.names[0])
        labels.append(f"{record.label}: median {median:.1f}°, {above:.0%} above 90°")
    axes.axvline(RIGHT_ANGLE, color="black", linewidth=1)
    axes.set_xlabel(f"angle between {_gradients(records)} (degrees)")
    axes.set_ylabel("share of the batches")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"{_data(records)}: gradient angles, parameters fixed, dropout off")
    plain(axes)
    legend_below(figure, handles, labels)
    return save_figure(figure, path)


def draw_by_layer(records: Sequence[AngleRecords], path: Path) -> list[Path]:
    """Median and 10th to 90th percentile of each group's angle: `path`.png and .svg.

    A group is left out of a run where a gradient is zero in every batch.
    """
    places = _places(records)
    figure = new_figure(max(6.0, 2.4 + 0.7 * len(places)), 4.6)
    axes = figure.subplots()
    handles = []
    for index, record in enumerate(records):
        # Beside one another, not on one another.
        shift = 0.12 * (index - (len(records) - 1) / 2)
        defined = [g for g in record.groups if record.num_undefined(g) < record.num_batches]
        spread = [np.percentile(record.angles(group), (10, 50, 90)) for group in defined]
        low, median, high = np.array(spread).T if spread else np.zeros((3, 0))
        x = np.array([places.index(group) for group in defined]) + shift
        band = np.array([median - low, high - median])
        bars = axes.errorbar(
            x, median, band, **look(index), linestyle="", capsize=3, markersize=6, linewidth=1.4
        )
        depth = [i for i, group in enumerate(defined) if not group.startswith("exit ")]
        color = look(index)["color"]
        path_of_layers = axes.plot(x[depth], median[depth], color=color, linewidth=1, alpha=0.6)
        mark(index, *path_of_layers, *_parts(bars))
        handles.append(bars)
    axes.axhline(RIGHT_ANGLE, color="black", linewidth=1)
    axes.set_xticks(range(len(places)), places, rotation=30 if len(places) > 5 else 0)
    axes.set_xlim(-0.6, len(places) - 0.4)
    axes.set_ylabel("angle (degrees)")
    axes.set_title(
        f"{_data(records)}: angle between {_gradients(records)},\nmedian and 10th to 90th "
        "percentile of the batches, dropout off",
        fontsize=11,
    )
    plain(axes)
    legend_below(figure, handles, [record.label for record in records])
    return save_figure(figure, path)


def _parts(bars: ErrorbarContainer) -> list[Artist]:
    """What error bars are drawn as."""
    line, caps, ranges = bars.lines
    return [part for part in (line, *caps, *ranges) if part is not None]


def _finding(record: AngleRecords) -> str:
    name = record.names[0]
    return (
        f"{record.label}: median {np.median(record.angles(name)):.1f} degrees over {name}, "
        f"{record.share_above(name):.0%} of {record.num_batches} batches above 90."
    )


def _batch_rows(records: Sequence[AngleRecords]) -> list[list[str]]:
    """A row for each run, batch and group."""
    rows = []
    for record in records:
        for name in record.names:
            norms = np.sqrt(record.totals(name)[:, 1:])
            columns = zip(record.angles(name), record.cosines(name), *norms.T, strict=True)
            for batch, (angle, cosine, main, auxiliary) in enumerate(columns, start=1):
                cells = [f"{angle:.4f}", f"{cosine:.6f}", f"{main:.6g}", f"{auxiliary:.6g}"]
                rows.append([record.label, str(batch), name, *cells])
    return rows


def _bins(angles: np.ndarray) -> np.ndarray:
    """Edges at whole steps, 90 among them; about 24, fewer for few angles."""
    extent = max(float(angles.max() - angles.min()), 1.0)
    # Few batches give no fine distribution.
    most = min(24.0, max(8.0, 2 * len(angles) ** 0.5))
    step = next(step for step in (0.25, 0.5, 1, 2, 2.5, 5, 10, 15, 30) if extent / step <= most)
    first = np.floor((angles.min() - RIGHT_ANGLE) / step)
    last = np.floor((angles.max() - RIGHT_ANGLE) / step) + 1
    return RIGHT_ANGLE + step * np.arange(first, last + 1)


def _places(records: Sequence[AngleRecords]) -> list[str]:
    """All groups of the runs, in the order of depth: those of a deep run first, then others'."""
    deepest = max(records, key=lambda record: len(record.groups))
    names = list(deepest.groups)
    others = dict.fromkeys(group for record in records for group in record.groups)
    names += [group for group in others if group not in names]
    exits = sorted((n for n in names if n.startswith("exit ")), key=lambda n: int(n.split()[1]))
    return [name for name in names if name not in exits] + exits


def _gradients(records: Sequence[AngleRecords]) -> str:
    losses = list(dict.fromkeys(record.contrastive for record in records))
    return f"the CE and the {' or '.join(losses)} gradient"


def _whole(records: Sequence[AngleRecords]) -> str:
    return " or ".join(dict.fromkeys(record.names[0] for record in records))


def _data(records: Sequence[AngleRecords]) -> str:
    return ", ".join(dict.fromkeys(record.data for record in records))
