"""Figure of the growth suite: time and peak memory against each size, one line per provider."""

from pathlib import Path
from typing import Any

from ...engine.runtime.plots import COLORS, legend_below, new_figure, plain
from ..measuring.environment import Result
from .png import save_png

AXES = {
    "M": "M, rows of supcon_loss",
    "d": "d, width of the rows",
    "K": "K, label embeddings of acl_loss",
    "E": "E, exits in one call",
    "P": "elements of each list of gradients",
}


def draw(result: Result, path: Path) -> None:
    """Draw times in the upper row and peak memory in the lower one."""
    from matplotlib.lines import Line2D

    cases = result["cases"]
    axes_names = [axis for axis in AXES if any(case["axis"] == axis for case in cases)]
    names = list(dict.fromkeys(name for case in cases for name in case["providers"]))
    colors = {name: COLORS[index % len(COLORS)] for index, name in enumerate(names)}
    figure = new_figure(3.3 * len(axes_names), 6.4)
    grid = figure.subplots(2, len(axes_names), squeeze=False)
    rows = (("p50_ms", 1, "milliseconds"), ("peak_bytes", 2**20, "peak memory, MiB"))
    for column, axis in enumerate(axes_names):
        axis_cases = [case for case in cases if case["axis"] == axis]
        for axes, (key, unit, words) in zip(grid[:, column], rows, strict=True):
            for name in names:
                _line(axes, axis_cases, name, key, unit, colors[name])
            axes.set(xscale="log", yscale="log", xlabel=AXES[axis])
            axes.set_ylabel(words if column == 0 else "")
            _ticks(axes, [case["size"] for case in axis_cases])
            plain(axes)
    handles = [Line2D([], [], color=color, marker="o", markersize=3) for color in colors.values()]
    legend_below(figure, handles, names)
    figure.suptitle(
        f"Growth of the cost, {path.parent.name}: loss forward + backward, angle's sums"
    )
    save_png(figure, path)


def _line(axes: Any, cases: list[Result], name: str, key: str, unit: float, color: str) -> None:
    found = [
        (case["size"], case["providers"][name][key] / unit)
        for case in cases
        if name in case["providers"] and case["providers"][name][key]
    ]
    axes.plot([x for x, _ in found], [y for _, y in found], "o-", color=color, markersize=3)


def _ticks(axes: Any, sizes: list[int]) -> None:
    """Label at most about five sizes; on the y axis, only powers of ten if there are two."""
    from matplotlib.ticker import NullFormatter

    shown = sizes[:: 1 + len(sizes) // 5]
    axes.set_xticks(shown, [_size_words(size) for size in shown])
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_ylim()
    if high / low > 30:
        axes.yaxis.set_minor_formatter(NullFormatter())


def _size_words(size: int) -> str:
    for unit, words in ((10**9, "G"), (10**6, "M")):
        if size >= unit:
            return f"{size / unit:g}{words}"
    return str(size)
