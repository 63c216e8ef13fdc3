"""Figures of scores by layer and by option."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...experiments.results import Seeds
from ...runtime.plots import PANELS_PER_ROW, legend_below, look, mark, panels, plain, save_figure


def draw_dots(
    scores: Mapping[str, Sequence[tuple[str, Seeds]]], label: str, path: Path
) -> list[Path]:
    """Draw a large dot for each mean and a small one for each seed; panel title -> (row, scores).

    `label`: that of the horizontal axis, in percent.
    """
    rows = [row for row, _ in next(iter(scores.values()))]
    figure, every = panels(len(scores), 1.3 + 0.32 * len(rows))
    for place, (axes, (title, entries)) in enumerate(zip(every, scores.items(), strict=True)):
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
        axes.set_title(title, fontsize=10)
        first = place % PANELS_PER_ROW == 0
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
    """Draw means over the seeds and their range; panel title -> line -> (value, scores)."""
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
            columns = [list(seeds.values.values()) for _, seeds in there]
            handles[line] = draw_line(axes, index, places, columns, first=2 * panel)
        # Evenly spaced: the values are a choice, not a scale.
        axes.set_xticks(range(len(values)), [str(value) for value in values])
        axes.set_xlabel(option, fontsize=9)
        axes.set_title(title, fontsize=10)
        plain(axes)
    every[0].set_ylabel(label)
    legend_below(figure, [handles[line] for line in lines], lines)
    return save_figure(figure, path)


def draw_line(
    axes: Any, index: int, places: Sequence[int], columns: Sequence[Sequence[float]], first: int = 0
) -> Any:
    """Draw series `index` as a line of means and a band of ranges over `places`; the line.

    columns: the scores at each place, as fractions; first: number of the line among the parts of
    the series.
    """
    means = [mean_of(scores) for scores in columns]
    (line,) = axes.plot(places, means, **look(index), markersize=5)
    low, high = ([100 * extreme(scores) for scores in columns] for extreme in (min, max))
    color = look(index)["color"]
    band = axes.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)
    mark(index, line, band, first=first)
    return line


def metric_words(metric: str) -> str:
    """The printed name of a metric."""
    named = {"f1": "F1", "macro_f1": "macro F1", "matthews_correlation": "Matthews correlation"}
    return named.get(metric, metric.replace("_", " "))


def mean_of(values: Sequence[float]) -> float:
    """The mean of fractions, in percent."""
    return 100 * statistics.mean(values)
