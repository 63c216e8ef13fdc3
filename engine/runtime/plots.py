"""What the figures of a report share: colours, legends that a page can follow, and panels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def require_matplotlib() -> None:
    """Check that figures can be drawn, before any work.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("Figures need matplotlib. Run: pip install 'fusedacl[demo]'") from None
