"""Roofline of a machine: its measured rates, and the rate that each provider reaches.

x axis: floating-point operations per byte that must be moved (rows and their gradients, or both
lists of gradients). y axis: operations of the problem per second, so that a provider that computes
more than the problem needs lies lower. Roofs: memory, matrix products, and for the loss the
exponentials that belong to the products. A GPU computes those at the same time as the products; on
a CPU the roof is that of both together. The exponentials' share depends on d.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...engine.runtime.plots import COLORS, legend_below, new_figure, plain, save_figure
from ..measuring.environment import Result
from ..suites.gate.case import AngleCase

LINES = ("--", ":", "-.")
MARKERS = {"supcon": "o", "acl": "s", "angle": "^"}
KINDS = {"supcon": "supcon_loss", "acl": "acl_loss", "angle": "angle's sums"}


def point(case: Result) -> tuple[float, float] | None:
    """(operations per byte, operations) of a loss or of the angle's sums; None for other cases."""
    shape = case["case"]
    size = getattr(torch, shape["dtype"]).itemsize
    if shape.get("loss") in KINDS:
        rows = shape["samples"] + (shape["classes"] if shape["loss"] == "acl" else 0)
        exits, width = shape["exits"], shape["width"]
        # Products forward and backward over half of the pairs, because similarity is symmetric.
        operations = exits * 4.0 * rows**2 * width
        return operations / (exits * rows * width * (3 * size + 4)), operations
    if shape.get("task") == "dot_norm":
        elements = AngleCase(**shape).elements
        return 6 * elements / (2 * elements * size), 6.0 * elements
    return None


def points(result: Result) -> list[Result]:
    """Intensity, operations per second and names of every provider in every case with a point."""
    return [
        {
            "provider": name, "kind": case["case"].get("loss", "angle"), "intensity": place[0],
            "per_second": place[1] / (entry["p50_ms"] / 1e3), "width": case["case"].get("width"),
        }
        for case in result.get("cases", [])
        if (place := point(case)) is not None
        for name, entry in case["providers"].items()
    ]  # fmt: skip


def roofs(results: Sequence[Result]) -> Mapping[str, Any]:
    """The highest rates that any run measured: operations, exponentials and bytes per second."""
    found = [
        rates
        for result in results
        for rates in (result.get("rates"), *(case.get("rates") for case in result["cases"]))
        if rates
    ]

    def highest(key: str) -> float:
        # Rates that a suite does not need are null.
        return max(rates[key] for rates in found if rates[key] is not None) * 1e9

    return {
        "flops": max(value for rates in found for value in rates["gigaflops"].values()) * 1e9,
        "exponentials": highest("giga_exponentials_per_second"),
        "bytes": highest("gigabytes_per_second"),
        "overlaps": all(rates["overlaps_units"] for rates in found),
    }


def exponential_roof(limits: Mapping[str, Any], width: int) -> tuple[float, str]:
    """Operations per second that the exponentials allow, and the name of the roof.

    One exponential belongs to 4 d operations: half of the pairs, forward and backward.
    """
    roof = 4 * width * limits["exponentials"]
    if limits["overlaps"]:
        return roof, "exp"
    return 1 / (1 / roof + 1 / limits["flops"]), "products and exp"


def draw(results: Sequence[Result], path: Path) -> None:
    """Draw path.png: the roofs and providers of a machine's loss and angle files."""
    from matplotlib.lines import Line2D

    shown = [each for result in results for each in points(result)]
    limits = roofs(results)
    figure = new_figure(9, 6.2)
    axes = figure.subplots()
    names = list(dict.fromkeys(each["provider"] for each in shown))
    # Providers beyond the palette get hollow markers.
    looks: dict[str, dict[str, Any]] = {
        name: {
            "color": COLORS[index % len(COLORS)],
            "fillstyle": "full" if index < len(COLORS) else "none",
        }
        for index, name in enumerate(names)
    }
    low = min(each["intensity"] for each in shown) / 3
    ridge = limits["flops"] / limits["bytes"]
    high = max(3 * max(each["intensity"] for each in shown), ridge)
    roof = [low * limits["bytes"], limits["flops"], limits["flops"]]
    axes.plot([low, ridge, high], roof, color="#222222", linewidth=2)
    start = max(low, ridge / 50)
    words = f"memory {limits['bytes'] / 1e9:.1f} GB/s"
    axes.text(start, 0.6 * start * limits["bytes"], words, fontsize=8, va="top")
    words = f"matrix product {limits['flops'] / 1e9:.0f} GFLOP/s"
    axes.text(high, limits["flops"] * 1.08, words, fontsize=8, ha="right")
    # In the legend: beside the lines, which may be close to each other, words would overlap.
    lower: dict[str, Line2D] = {}
    for place, width in enumerate(sorted({each["width"] for each in shown if each["width"]})):
        height, words = exponential_roof(limits, width)
        style: dict[str, Any] = {
            "linestyle": LINES[place % len(LINES)],
            "color": "#777777",
            "linewidth": 1,
        }
        (lower[f"{words} at d = {width}"],) = axes.plot([ridge, high], [height, height], **style)
    for each in shown:
        axes.plot(
            each["intensity"], each["per_second"], MARKERS[each["kind"]], markersize=6, alpha=0.85,
            **looks[each["provider"]],
        )  # fmt: skip
    axes.set(
        xscale="log", yscale="log", xlabel="operations of the problem per byte that must be moved",
        ylabel="operations of the problem per second",
    )  # fmt: skip
    plain(axes)
    handles = [Line2D([], [], marker="o", linestyle="", **looks[name]) for name in names]
    kinds = [kind for kind in MARKERS if any(each["kind"] == kind for each in shown)]
    handles += [
        Line2D([], [], marker=MARKERS[kind], linestyle="", color="#555555", fillstyle="none")
        for kind in kinds
    ]
    labels = [*names, *(KINDS[kind] for kind in kinds), *lower]
    legend_below(figure, [*handles, *lower.values()], labels)
    figure.suptitle(
        f"Roofline, {path.parent.name}: forward + backward; roofs measured in the same runs"
    )
    save_figure(figure, path, (".png",))
