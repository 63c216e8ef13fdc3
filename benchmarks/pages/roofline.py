"""The roofline of a machine: what its measured rates allow, and where ours and the others are.

Across: floating-point operations for each byte that must be moved (compulsory traffic: rows and
their gradients, or both lists of gradients). Up: operations of the problem a second, so that a
provider that does more work than the problem needs is lower. Roofs: copying, the matrix product,
and for the loss the exponentials that go with the products: on a GPU the special function unit's
own roof, on a CPU, where one unit does both, the two together. Their share depends on d.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...engine.runtime.plots import save_figure
from ..measuring.environment import Result

NAME = "roofline"
COLORS = (
    "#55a868", "#c44e52", "#4c72b0", "#dd8452", "#8172b3", "#937860", "#da8bc3", "#8c8c8c",
    "#ccb974", "#64b5cd", "#1b4f2a", "#7f1d1d", "#173f73", "#b15928", "#4b2e83", "#000000",
)  # fmt: skip
MARKERS = {"supcon": "o", "acl": "s", "angle": "^"}


def point(case: Result) -> tuple[float, float] | None:
    """(operations a byte, operations) of a case of the loss, or of the angle's sums."""
    shape = case["case"]
    size = getattr(torch, shape["dtype"]).itemsize
    if "loss" in shape:
        rows = shape["samples"] + (shape["classes"] if shape["loss"] == "acl" else 0)
        exits, width = shape["exits"], shape["width"]
        # Products forward and backward, e being symmetric: the "tiles" of floors.py.
        operations = exits * 4.0 * rows**2 * width
        return operations / (exits * rows * width * (3 * size + 4)), operations
    if shape.get("task") == "dot_norm":
        elements = _elements(case)
        return 6 * elements / (2 * elements * size), 6.0 * elements
    return None


def _elements(case: Result) -> float:
    from ..suites.gate.case import AngleCase

    return float(AngleCase(**case["case"]).elements)


def points(result: Result) -> list[Result]:
    """Every provider of every case that has a place: intensity, operations a second, names."""
    found = []
    for case in result.get("cases", []):
        place = point(case)
        if place is None:
            continue
        intensity, operations = place
        kind = case["case"].get("loss", "angle")
        found += [
            {
                "provider": name, "kind": kind, "intensity": intensity,
                "per_second": operations / (entry["p50_ms"] / 1e3), "words": case["words"],
                "width": case["case"].get("width"),
            }
            for name, entry in case["providers"].items()
        ]  # fmt: skip
    return found


def roofs(results: Sequence[Result]) -> Mapping[str, Any]:
    """The best rates that any run of the machine measured, in operations and bytes a second."""
    flops, exponentials, copied, overlaps = [], [], [], True
    for result in results:
        for rates in (result.get("rates"), *(case.get("rates") for case in result["cases"])):
            if rates:
                flops += list(rates["gigaflops"].values())
                exponentials.append(rates["giga_exponentials_per_second"])
                copied.append(rates["gigabytes_per_second"])
                overlaps = overlaps and rates["overlaps_units"]
    # A suite that does not need a rate has none.
    known = [
        [value * 1e9 for value in values if value is not None]
        for values in (flops, exponentials, copied)
    ]
    names = ("flops", "exponentials", "bytes")
    return dict(zip(names, map(max, known), strict=True)) | {"overlaps": overlaps}


def exponential_roof(limits: Mapping[str, Any], width: int) -> tuple[float, str]:
    """Operations a second with the exponentials they need, and what the roof is called.

    Half the pairs have one in the forward pass and half in the backward pass: 4 d operations each.
    """
    roof = 4 * width * limits["exponentials"]
    if limits["overlaps"]:
        return roof, "exp"
    return 1 / (1 / roof + 1 / limits["flops"]), "products and exp"


def draw(results: Sequence[Result], machine: str, directory: Path) -> list[str]:
    """roofline.png and roofline.svg of a machine's loss and angle files."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    shown = [each for result in results for each in points(result)]
    limits = roofs(results)
    figure = Figure(figsize=(9, 6.2), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(each["provider"] for each in shown))
    colors = {name: COLORS[index % len(COLORS)] for index, name in enumerate(names)}
    low = min(each["intensity"] for each in shown) / 3
    high = max(each["intensity"] for each in shown) * 3
    ridge = limits["flops"] / limits["bytes"]
    axes.plot(
        [low, ridge, max(high, ridge)],
        [low * limits["bytes"], limits["flops"], limits["flops"]],
        color="#222222",
        linewidth=2,
    )
    start = max(low, ridge / 50)
    axes.text(
        start, 0.6 * start * limits["bytes"], f"memory {limits['bytes'] / 1e9:.1f} GB/s",
        fontsize=8, va="top",
    )  # fmt: skip
    axes.text(
        high, limits["flops"] * 1.08, f"matrix product {limits['flops'] / 1e9:.0f} GFLOP/s",
        fontsize=8, ha="right",
    )  # fmt: skip
    for width in sorted({each["width"] for each in shown if each["width"]}):
        roof, words = exponential_roof(limits, width)
        axes.plot([ridge, max(high, ridge)], [roof, roof], "--", color="#777777", linewidth=1)
        axes.text(ridge, roof, f"{words} at d = {width}", fontsize=8, color="#555555", va="top")
    for each in shown:
        axes.plot(
            each["intensity"], each["per_second"], MARKERS[each["kind"]],
            color=colors[each["provider"]], markersize=6, alpha=0.85,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations of the problem for each byte that must be moved")
    axes.set_ylabel("operations of the problem a second")
    axes.spines[["top", "right"]].set_visible(False)
    kinds = {"supcon": "supcon_loss", "acl": "acl_loss", "angle": "angle's sums"}
    handles: list[Any] = [
        Line2D([], [], marker="o", linestyle="", color=colors[name], label=name) for name in names
    ]
    handles += [
        Line2D([], [], marker=marker, linestyle="", color="#555555", fillstyle="none",
               label=kinds[kind])
        for kind, marker in MARKERS.items()
        if any(each["kind"] == kind for each in shown)
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.suptitle(f"Roofline, {machine}: forward + backward; roofs measured in the same runs")
    directory.mkdir(parents=True, exist_ok=True)
    return [file.name for file in save_figure(figure, directory / NAME)]
