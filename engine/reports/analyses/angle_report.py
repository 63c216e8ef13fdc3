"""`fusedacl angles`: tables and figures of gradient angles (Figure 2 of arXiv 2602.03563)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...config.commands import AngleConfig
from ...experiments.runs import named_runs
from ...runtime import plots
from ...runtime.files import check_writable
from ...runtime.text import text_table, write_tables
from ..page.page import Figure, Section, Table, write_analysis
from ..run_figures import angle_words, draw_angles
from .gradient_angles import RIGHT_ANGLE, AngleRecords, measure_angles

CSV_HEADER = (
    "run", "batch", "group", "angle_degrees", "cosine", "norm_ce", "norm_contrastive",
)  # fmt: skip
TABLE_HEADER = (
    "run", "parameters", "batches", "median", "10-90 %", "share > 90", "zero gradients",
)  # fmt: skip


def report_angles(runs: Sequence[Path], config: AngleConfig) -> tuple[str, list[Path]]:
    """Measure the angles of runs and write tables and figures; returns as `write_angles`.

    Raises:
        ValueError: as `measure_angles`; `output_dir`, a label or matplotlib is missing; nothing can
            be written to `output_dir`.
        FloatingPointError: as `measure_angles`.
    """
    if config.angles.output_dir is None:
        raise ValueError("output_dir is missing: name the directory for tables and figures.")
    check_writable(Path(config.angles.output_dir), "output_dir", directory=True)
    plots.require_matplotlib()
    named = named_runs(runs, config.angles.labels)
    records = [
        measure_angles(run, config, label) for run, (label, _) in zip(runs, named, strict=True)
    ]
    return write_angles(records, Path(config.angles.output_dir))


def write_angles(records: Sequence[AngleRecords], output_dir: Path) -> tuple[str, list[Path]]:
    """Write angles.*, angles_by_layer.* and index.html, with the figures' captions beside them.

    Returns the table to print, and the files.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    rows, words = angle_rows(records), notes(records)
    numbers = CSV_HEADER, _batch_rows(records)
    tables = write_tables(output_dir / "angles", TABLE_HEADER, rows, "\n\n".join(words), numbers)
    whole = draw_histograms(records, output_dir / "angles")
    by_layer = draw_by_layer(records, output_dir / "angles_by_layer")
    groups = " or ".join(dict.fromkeys(record.names[0] for record in records))
    figures = [
        Figure(
            whole[1],
            f"Angle between {_gradients(records)} over {groups} of trained models, by training "
            f"batch ({_data(records)}); dashed: 90 degrees. Parameters fixed, dropout off.",
        ),
        Figure(
            by_layer[1],
            "The same by part of the model: median and 10th to 90th percentile of the batches of "
            f"{_data(records)}.",
        ),
    ]
    findings = [
        f"{record.label}: median {np.median(record.angles(name)):.1f} degrees over {name}, "
        f"{record.share_above(name):.0%} of {record.num_batches} batches above 90."
        for record in records
        for name in record.names[:1]
    ]
    title, table = "Gradient angles", Table(TABLE_HEADER, rows)
    files = [*tables, *whole, *by_layer]
    section = Section(title, figures=figures, tables=[table], notes=words, files=files)
    files = write_analysis(output_dir, title, findings, section)
    return "\n".join([text_table(TABLE_HEADER, rows), "", *words]), files


def angle_rows(records: Sequence[AngleRecords]) -> list[list[str]]:
    """The rows of the table, one per run and group of parameters; in degrees."""
    rows = []
    for record in records:
        for name in record.names:
            low, median, high = np.percentile(record.angles(name), (10, 50, 90))
            angles = [
                f"{median:.1f}",
                f"{low:.1f} to {high:.1f}",
                f"{record.share_above(name):.1%}",
            ]
            counts = str(record.num_batches), str(record.num_undefined(name))
            rows.append([record.label, name, counts[0], *angles, counts[1]])
    return rows


def notes(records: Sequence[AngleRecords]) -> list[str]:
    """Sentences on how the numbers were measured and what limits them."""
    lines = [
        "Angle in degrees between the gradients of the cross-entropy and of the contrastive loss "
        "of one training batch; parameters fixed, dropout off, float32."
    ]
    lines += [f"{record.label}: {record.settings}." for record in records]
    for record in records:
        counts = {name: record.num_undefined(name) for name in record.names}
        words = ", ".join(f"{count} over {name}" for name, count in counts.items() if count)
        if words:
            lines.append(
                f"{record.label}: batches, of {record.num_batches}, in which a gradient is zero, "
                f"so that the angle is 90 by convention: {words}."
            )
        if record.num_single_class:
            lines.append(
                f"{record.label}: {record.num_single_class} of {record.num_batches} batches hold "
                "one class only."
            )
    return lines


def draw_histograms(records: Sequence[AngleRecords], path: Path) -> list[Path]:
    """Histogram of the angle over all parameters of each run: `path`.png and .svg."""
    series: dict[str, list[float]] = {}
    for record in records:
        angles = record.angles(record.names[0]).tolist()
        series[f"{record.label}: {angle_words(angles, RIGHT_ANGLE)}"] = angles
    return draw_angles(
        {f"{_data(records)}: gradient angles, parameters fixed, dropout off": series},
        [RIGHT_ANGLE],
        path,
        bin_degrees=_bin_degrees(np.concatenate(list(series.values()))),
        height=4.6,
        label=f"angle between {_gradients(records)} (degrees)",
        counted="batches",
    )


def draw_by_layer(records: Sequence[AngleRecords], path: Path) -> list[Path]:
    """Median and 10th to 90th percentile of the angle of each group: `path`.png and .svg.

    A group is left out of a run if a gradient is zero in every batch.
    """
    places = _places(records)
    figure = plots.new_figure(max(6.0, 2.4 + 0.7 * len(places)), 4.6)
    axes = figure.subplots()
    handles = []
    for index, record in enumerate(records):
        # Shifted, so that the error bars of runs do not overlap.
        shift = 0.12 * (index - (len(records) - 1) / 2)
        defined = [g for g in record.groups if record.num_undefined(g) < record.num_batches]
        spread = [np.percentile(record.angles(group), (10, 50, 90)) for group in defined]
        low, median, high = np.array(spread).T if spread else np.zeros((3, 0))
        x = np.array([places.index(group) for group in defined]) + shift
        band = np.array([median - low, high - median])
        style = plots.look(index)
        bars = axes.errorbar(
            x, median, band, **style, linestyle="", capsize=3, markersize=6, linewidth=1.4
        )
        depth = [i for i, group in enumerate(defined) if not group.startswith("exit ")]
        path_of_layers = axes.plot(
            x[depth], median[depth], color=style["color"], linewidth=1, alpha=0.6
        )
        line, caps, ranges = bars.lines
        parts = [part for part in (line, *caps, *ranges) if part is not None]
        plots.mark(index, *path_of_layers, *parts)
        handles.append(bars)
    axes.axhline(RIGHT_ANGLE, color="black", linewidth=1)
    axes.set_xticks(range(len(places)), places, rotation=30 if len(places) > 5 else 0)
    axes.set(xlim=(-0.6, len(places) - 0.4), ylabel="angle (degrees)")
    axes.set_title(
        f"{_data(records)}: angle between {_gradients(records)},\nmedian and 10th to 90th "
        "percentile of the batches, dropout off",
        fontsize=11,
    )
    plots.plain(axes)
    plots.legend_below(figure, handles, [record.label for record in records])
    return plots.save_figure(figure, path)


def _batch_rows(records: Sequence[AngleRecords]) -> list[list[str]]:
    rows = []
    for record in records:
        for name in record.names:
            norms = np.sqrt(record.totals(name)[:, 1:])
            columns = zip(record.angles(name), record.cosines(name), *norms.T, strict=True)
            for batch, (angle, cosine, main, auxiliary) in enumerate(columns, start=1):
                cells = [f"{angle:.4f}", f"{cosine:.6f}", f"{main:.6g}", f"{auxiliary:.6g}"]
                rows.append([record.label, str(batch), name, *cells])
    return rows


def _bin_degrees(angles: np.ndarray) -> float:
    """Width of about 24 bins, or of fewer, wider ones for few angles."""
    extent = max(float(angles.max() - angles.min()), 1.0)
    most = min(24.0, max(8.0, 2 * len(angles) ** 0.5))
    return next(step for step in (0.25, 0.5, 1, 2, 2.5, 5, 10, 15, 30) if extent / step <= most)


def _places(records: Sequence[AngleRecords]) -> list[str]:
    """All groups of the runs by depth, exits last; the run with most groups sets the order."""
    deepest = max(records, key=lambda record: len(record.groups))
    names = dict.fromkeys(group for record in [deepest, *records] for group in record.groups)
    exits = sorted((n for n in names if n.startswith("exit ")), key=lambda n: int(n.split()[1]))
    return [name for name in names if name not in exits] + exits


def _gradients(records: Sequence[AngleRecords]) -> str:
    losses = list(dict.fromkeys(record.contrastive for record in records))
    return f"the CE and the {' or '.join(losses)} gradient"


def _data(records: Sequence[AngleRecords]) -> str:
    return ", ".join(dict.fromkeys(record.data for record in records))
