"""Figures of scores by layer and by option."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...experiments.results import Seeds
from ...runtime.plots import PANELS_PER_ROW, legend_below, look, mark, panels, save_figure


def draw_dots(
    scores: Mapping[str, Sequence[tuple[str, Seeds]]], label: str, path: Path
) -> list[Path]:
    """Draw a large dot for each mean and a small one for each seed; panel -> (row, scores)."""
    rows = [row for row, _ in next(iter(scores.values()))]
    figure, every = panels(list(scores), 1.3 + 0.32 * len(rows), label)
    for place, (axes, entries) in enumerate(zip(every, scores.values(), strict=True)):
        for row, (_, seeds) in enumerate(entries):
            color = look(row)["color"]
            if not seeds:
                # In the middle of the axes, independent of the scale.
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
        first = place % PANELS_PER_ROW == 0
        axes.set_yticks(range(len(rows)), rows if first else [""] * len(rows))
    return save_figure(figure, path)


def draw_values(
    scores: Mapping[str, Mapping[str, Sequence[tuple[Any, Seeds]]]],
    option: str,
    label: str,
    path: Path,
) -> list[Path]:
    """Draw means over the seeds and their range; panel title -> line -> (value, scores)."""
    lines = list(dict.fromkeys(line for of_panel in scores.values() for line in of_panel))
    every_line = [points for of_panel in scores.values() for points in of_panel.values()]
    values = list(dict.fromkeys(value for points in every_line for value, _ in points))
    figure, every = panels(list(scores), 3.2, option)
    handles: dict[str, Any] = {}
    for panel, (axes, of_panel) in enumerate(zip(every, scores.values(), strict=True)):
        for line, points in of_panel.items():
            index = lines.index(line)
            there = [(values.index(value), seeds) for value, seeds in points if seeds]
            places, columns = [place for place, _ in there], [seeds for _, seeds in there]
            handles[line] = draw_line(axes, index, places, columns, first=2 * panel)
        # Evenly spaced: the values are a choice, not a scale.
        axes.set_xticks(range(len(values)), [str(value) for value in values])
    every[0].set_ylabel(label)
    legend_below(figure, [handles[line] for line in lines], lines)
    return save_figure(figure, path)


def draw_line(
    axes: Any, index: int, places: Sequence[int], columns: Sequence[Seeds], first: int = 0
) -> Any:
    """Draw series `index` as a line of means and a band of ranges over `places`; the line.

    columns: the scores at each place; first: number of the line among the parts of the series.
    """
    (line,) = axes.plot(
        places, [100 * seeds.mean for seeds in columns], **look(index), markersize=5
    )
    low, high = ([100 * end(seeds.values.values()) for seeds in columns] for end in (min, max))
    color = look(index)["color"]
    band = axes.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)
    mark(index, line, band, first=first)
    return line


def metric_words(metric: str) -> str:
    """The printed name of a metric."""
    named = {"f1": "F1", "macro_f1": "macro F1", "matthews_correlation": "Matthews correlation"}
    return named.get(metric, metric.replace("_", " "))
