"""Figure of the growth suite: time and peak memory against each size, one line per provider."""

from pathlib import Path
from typing import Any

from ...engine.runtime.plots import COLORS, legend_below, new_figure, plain, save_figure
from ..measuring.environment import Result

AXES = {
    "M": "M, rows of supcon_loss",
    "d": "d, width of the rows",
    "K": "K, label embeddings of acl_loss",
    "E": "E, exits in one call",
    "P": "elements of each list of gradients",
}


def draw(result: Result, path: Path) -> None:
    """Draw path.png: times in the upper row and peak memory in the lower one."""
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
            for name, color in colors.items():
                line = {
                    case["size"]: case["providers"][name][key] / unit
                    for case in axis_cases
                    if case["providers"].get(name, {}).get(key)
                }
                axes.plot(list(line), list(line.values()), "o-", color=color, markersize=3)
            axes.set_xlabel(AXES[axis])
            if any(len(line.get_xdata()) for line in axes.lines):
                axes.set(xscale="log", yscale="log")
            else:
                axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center")
            axes.set_ylabel(words if column == 0 else "")
            _ticks(axes, [case["size"] for case in axis_cases])
            plain(axes)
    handles = [Line2D([], [], color=color, marker="o", markersize=3) for color in colors.values()]
    legend_below(figure, handles, names)
    figure.suptitle(
        f"Growth of the cost, {path.parent.name}: loss forward + backward, angle's sums"
    )
    save_figure(figure, path, (".png",))


def _ticks(axes: Any, sizes: list[int]) -> None:
    """Label at most about five sizes; on the y axis, only powers of ten if there are two."""
    from matplotlib.ticker import EngFormatter, NullFormatter

    shown = sizes[:: 1 + len(sizes) // 5]
    words = [EngFormatter(sep="")(size) if size >= 10**6 else str(size) for size in shown]
    axes.set_xticks(shown, words)
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_ylim()
    if high / low > 30:
        axes.yaxis.set_minor_formatter(NullFormatter())
