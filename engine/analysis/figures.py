"""What the figures of a report share: colours, legends that a page can follow, and panels."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .sweep_results import Seeds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# At least 3:1 on white and on the dark page; the markers tell them apart without colour.
COLORS = ("#3a6fb8", "#c8641b", "#2a9163", "#9159b8", "#cf4552", "#8f6b4f", "#1b8fa6", "#7d7d7d")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_PANELS_A_ROW = 3


def look(index: int) -> dict[str, Any]:
    """Colour and marker of the series number `index`."""
    return {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)]}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path) -> list[Path]:
    """`path`.png and `path`.svg, the same bytes for the same figure."""
    from matplotlib import rc_context

    files = [path.with_name(path.name + suffix) for suffix in (".png", ".svg")]
    # Letters stay letters: they can be read out, searched and recoloured by a page.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": path.name}):
        figure.savefig(files[0], dpi=150)
        figure.savefig(files[1], metadata={"Date": None})
    return files


def plain(axes: Axes) -> None:
    """A light grid and two spines."""
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def mark(index: int, *artists: Any, first: int = 0) -> None:
    """Name the parts of the series number `index`, so that a page can show it alone."""
    for number, artist in enumerate(artists, start=first):
        artist.set_gid(f"series-{index}-{number}")


def legend_below(
    figure: Figure,
    handles: Sequence[Any],
    labels: Sequence[str],
    series: Sequence[int] | None = None,
) -> None:
    """A legend under the axes; its entries are named after their series (by default 0, 1, …)."""
    widest = max(map(len, labels))
    columns = max(1, min(len(labels), round(13 * figure.get_figwidth() / (widest + 8))))
    legend = figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )
    pairs = zip(legend.legend_handles, legend.get_texts(), strict=True)
    for index, (handle, text) in zip(series or range(len(labels)), pairs, strict=True):
        if handle is not None:
            handle.set_gid(f"legend-{index}")
        text.set_gid(f"legend-{index}-text")


def panels(number: int, height: float, width: float = 3.1) -> tuple[Figure, list[Axes]]:
    """A figure with `number` panels, each about `width` by `height` inches, rows of three."""
    columns = min(number, _PANELS_A_ROW)
    rows = math.ceil(number / columns)
    figure = new_figure(max(6.0, columns * width + 1.2), rows * height)
    every = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in every[number:]:
        axes.set_visible(False)
    return figure, every[:number]


def draw_dots(
    scores: Mapping[str, Sequence[tuple[str, Seeds]]], label: str, path: Path
) -> list[Path]:
    """Panel title -> (row, scores): a large dot for the mean, a small one for each seed.

    `label`: what the horizontal axis shows, in percent.
    """
    rows = [row for row, _ in next(iter(scores.values()))]
    figure, every = panels(len(scores), 1.3 + 0.32 * len(rows))
    for place, (axes, (title, entries)) in enumerate(zip(every, scores.items(), strict=True)):
        for row, (_, seeds) in enumerate(entries):
            color = look(row)["color"]
            if not seeds:
                # At the axes' middle, whatever the scale is.
                axes.annotate(
                    "missing", (0.5, row), xycoords=("axes fraction", "data"), ha="center",
                    va="center", color="#7d7d7d", fontsize=8,
                )  # fmt: skip
                continue
            single = [100 * value for value in seeds.values.values()]
            axes.plot(single, [row] * len(single), "o", color=color, markersize=3.5, alpha=0.55)
            axes.plot(100 * seeds.mean, row, **look(row), markersize=8, linestyle="")
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.margins(x=0.12)
        axes.set_title(title, fontsize=10)
        first = place % _PANELS_A_ROW == 0
        axes.set_yticks(range(len(rows)), rows if first else [""] * len(rows))
        axes.set_xlabel(label, fontsize=9)
        plain(axes)
    return save_figure(figure, path)


def draw_values(
    scores: Mapping[str, Mapping[str, Sequence[tuple[Any, Seeds]]]],
    option: str,
    label: str,
    path: Path,
) -> list[Path]:
    """Panel title -> line -> (value, scores): the mean over the seeds, and their range."""
    lines = list(dict.fromkeys(line for of_panel in scores.values() for line in of_panel))
    values = list(
        dict.fromkeys(
            value for lines in scores.values() for points in lines.values() for value, _ in points
        )
    )
    figure, every = panels(len(scores), 3.2)
    handles: dict[str, Any] = {}
    for panel, (axes, (title, of_panel)) in enumerate(zip(every, scores.items(), strict=True)):
        for line, points in of_panel.items():
            index = lines.index(line)
            there = [(values.index(value), seeds) for value, seeds in points if seeds]
            places = [place for place, _ in there]
            means = [100 * seeds.mean for _, seeds in there]
            handles[line] = axes.plot(places, means, **look(index), markersize=5)[0]
            band = axes.fill_between(
                places,
                [100 * min(seeds.values.values()) for _, seeds in there],
                [100 * max(seeds.values.values()) for _, seeds in there],
                color=look(index)["color"],
                alpha=0.15,
                linewidth=0,
            )
            mark(index, handles[line], band, first=2 * panel)
        # One step a value, whatever its size: the values are a choice, not a scale.
        axes.set_xticks(range(len(values)), [str(value) for value in values])
        axes.set_xlabel(option, fontsize=9)
        axes.set_title(title, fontsize=10)
        plain(axes)
    every[0].set_ylabel(label)
    legend_below(figure, [handles[line] for line in lines], lines)
    return save_figure(figure, path)


def metric_words(metric: str) -> str:
    """A metric's name as people write it."""
    named = {"f1": "F1", "macro_f1": "macro F1", "matthews_correlation": "Matthews correlation"}
    return named.get(metric, metric.replace("_", " "))


def mean_of(values: Sequence[float]) -> float:
    """The mean in percent of fractions."""
    return 100 * statistics.mean(values)
