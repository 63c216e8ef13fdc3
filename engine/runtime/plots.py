"""Colours, markers, legends and panels of all figures, and how figures are saved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The one palette. Contrast is at least 3:1 on white and on the dark page; where colours stand for
# series, markers tell the series apart without colour.
COLORS = ("#3a6fb8", "#c8641b", "#2a9163", "#9159b8", "#cf4552", "#8f6b4f", "#1b8fa6", "#7d7d7d")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
PANELS_PER_ROW = 3


def look(index: int) -> dict[str, Any]:
    """Return colour and marker of series `index`."""
    return {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)]}


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure; width and height in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(
    figure: Figure, path: Path, suffixes: Sequence[str] = (".png", ".svg")
) -> list[Path]:
    """Save `path`.png and `path`.svg and return both; equal figures give equal bytes."""
    from matplotlib import rc_context

    files = [path.with_name(path.name + suffix) for suffix in suffixes]
    # Text stays text in SVG: a page can search and recolour it, a screen reader can read it.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": path.name}):
        for file in files:
            options: Any = {"metadata": {"Date": None}} if file.suffix == ".svg" else {"dpi": 150}
            figure.savefig(file, **options)
    return files


def plain(axes: Axes) -> None:
    """Style axes with a light grid and without the top and right spines."""
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def mark(index: int, *artists: Any, first: int = 0) -> None:
    """Give the artists of series `index` ids, by which a page can highlight the series."""
    for number, artist in enumerate(artists, start=first):
        artist.set_gid(f"series-{index}-{number}")


def legend_below(
    figure: Figure,
    handles: Sequence[Any],
    labels: Sequence[str],
    series: Sequence[int] | None = None,
) -> None:
    """Draw a legend below the axes; entry i has the id of `series[i]` (by default i)."""
    widest = max(map(len, labels))
    columns = max(1, min(len(labels), round(13 * figure.get_figwidth() / (widest + 8))))
    while True:
        legend = figure.legend(
            handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9
        )
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()
        columns -= 1
    pairs = zip(legend.legend_handles, legend.get_texts(), strict=True)
    for index, (handle, text) in zip(series or range(len(labels)), pairs, strict=True):
        if handle is not None:
            handle.set_gid(f"legend-{index}")
        text.set_gid(f"legend-{index}-text")


def panels(
    titles: Sequence[str], height: float, label: str, title_size: float = 10
) -> tuple[Figure, list[Axes]]:
    """Make a figure of panels, each about 3.1 by `height` inches, three per row.

    label: that of the horizontal axes.
    """
    columns = min(len(titles), PANELS_PER_ROW)
    rows = math.ceil(len(titles) / columns)
    figure = new_figure(max(6.0, columns * 3.1 + 1.2), rows * height)
    every = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in every[len(titles) :]:
        axes.set_visible(False)
    for axes, title in zip(every, titles, strict=False):
        axes.set_title(title, fontsize=title_size)
        axes.set_xlabel(label, fontsize=9)
        plain(axes)
    return figure, every[: len(titles)]


def require_matplotlib() -> None:
    """Check that figures can be drawn, before any other work.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("Figures need matplotlib. Run: pip install 'fusedacl[demo]'") from None
