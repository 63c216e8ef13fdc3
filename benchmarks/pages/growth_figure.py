"""The figure of `bench growth`: time and peak memory against each size, a line a provider."""

from pathlib import Path
from typing import Any

from ...engine.runtime.plots import save_figure
from ..measuring.environment import Result
from .roofline import COLORS

NAME = "growth"
AXES = {
    "M": "M, rows of supcon_loss",
    "d": "d, width of the rows",
    "K": "K, label embeddings of acl_loss",
    "E": "E, exits in one call",
    "P": "elements of each list of gradients",
}


def draw(result: Result, machine: str, directory: Path) -> list[str]:
    """growth.png and growth.svg; times above, peak memory below."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    cases = result["cases"]
    axes_names = [axis for axis in AXES if any(case["axis"] == axis for case in cases)]
    names = list(dict.fromkeys(name for case in cases for name in case["providers"]))
    colors = {name: COLORS[index % len(COLORS)] for index, name in enumerate(names)}
    figure = Figure(figsize=(3.3 * len(axes_names), 6.4), layout="constrained")
    grid = figure.subplots(2, len(axes_names), squeeze=False)
    for column, axis in enumerate(axes_names):
        of_axis = [case for case in cases if case["axis"] == axis]
        for axes, key, unit in zip(grid[:, column], ("p50_ms", "peak_bytes"), (1, 2**20),
                                   strict=True):  # fmt: skip
            for name in names:
                _line(axes, of_axis, name, key, unit, colors[name])
            axes.set_xscale("log")
            axes.set_yscale("log")
            _ticks(axes, [case["size"] for case in of_axis])
            axes.set_xlabel(AXES[axis])
            axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].set_ylabel("milliseconds")
    grid[1][0].set_ylabel("peak memory beyond the inputs (MiB)")
    handles = [Line2D([], [], color=colors[name], marker="o", markersize=3, label=name)
               for name in names]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.suptitle(f"How cost grows, {machine}: forward + backward, and the angle's sums")
    directory.mkdir(parents=True, exist_ok=True)
    return [file.name for file in save_figure(figure, directory / NAME)]


def _line(axes: Any, cases: list[Result], name: str, key: str, unit: float, color: str) -> None:
    found = [
        (case["size"], case["providers"][name][key] / unit)
        for case in cases
        if name in case["providers"] and case["providers"][name][key]
    ]
    axes.plot([x for x, _ in found], [y for _, y in found], "o-", color=color, markersize=3)


def _ticks(axes: Any, sizes: list[int]) -> None:
    """The measured sizes below, as many as have room; beside, powers of ten where there are two."""
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
