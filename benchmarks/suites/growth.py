"""Growth of time and memory along one size at a time, with fitted exponents.

Sizes of the loss: M rows, d width, K label embeddings, E exits; P: elements of each list of
gradients. An exponent is the least-squares slope between the logarithms of size and of time (or
peak memory) over the upper half of the points: at small sizes, the overhead of a call dominates.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..measuring.environment import Result
from ..measuring.times_table import Table
from .gate.case import AngleCase
from .gate.suite import SUITE as ANGLE
from .loss.case import LossCase
from .loss.suite import SUITE as LOSS
from .suite import Suite

# A slope through fewer points is not reported.
MIN_POINTS = 3
# The implementations that people use; the others grow alike.
LOSS_PROVIDERS = ("fusedacl", "dense", "checkpointed row blocks", "pytorch-metric-learning")
ANGLE_PROVIDERS = ("fusedacl", "concatenate + dot + norms", "torch._foreach norms + dots")
M_OF_WIDTHS = 2048


@dataclass(frozen=True)
class Series:
    """One size that varies: the suite, its providers and a case for each value."""

    axis: str
    suite: Suite
    providers: tuple[str, ...]
    sizes: tuple[int, ...]
    cases: tuple[Any, ...]


SIZES: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {
    ("cpu", "quick"): {
        "M": (64, 128, 256, 512), "d": (64, 256), "K": (2, 100), "E": (1, 4),
        "P": (1_000_000, 2_000_000),
    },
    ("cpu", "full"): {
        "M": tuple(2**exponent for exponent in range(6, 15)),
        "d": (64, 128, 256, 512, 1024),
        "K": (2, 10, 100, 1000, 10000),
        "E": (1, 2, 4, 8, 16, 24),
        "P": (10**6, 10**7, 10**8, 3 * 10**8, 10**9),
    },
}  # fmt: skip
SIZES["cuda", "quick"] = SIZES["cpu", "quick"] | {"M": (1024, 2048, 4096, 8192)}
SIZES["cuda", "full"] = SIZES["cpu", "full"] | {
    "M": tuple(2**exponent for exponent in range(6, 17))
}


def all_series(device: str, preset: str, dtype: str, samples: int) -> list[Series]:
    sizes = SIZES[device, preset]
    width = 64
    rows = M_OF_WIDTHS if preset == "full" else 256
    cases: dict[str, list[Any]] = {
        "M": [LossCase("supcon", size, width, 16, dtype=dtype) for size in sizes["M"]],
        "d": [LossCase("supcon", rows, size, 16, dtype=dtype) for size in sizes["d"]],
        "K": [LossCase("acl", samples, width, size, dtype=dtype) for size in sizes["K"]],
        "E": [LossCase("acl", samples, width, 2, size, dtype) for size in sizes["E"]],
        "P": [AngleCase("dot_norm", size, dtype) for size in sizes["P"]],
    }
    return [
        Series(
            axis, ANGLE if axis == "P" else LOSS,
            ANGLE_PROVIDERS if axis == "P" else LOSS_PROVIDERS, sizes[axis], tuple(of_axis),
        )
        for axis, of_axis in cases.items()
    ]  # fmt: skip


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """Slope of log y over log x in the upper half of the points (x, y), None for too few.

    Points whose y is not above 0 are ignored.
    """
    usable = sorted((x, y) for x, y in points if x > 0 and y > 0)
    upper = usable[min(len(usable) // 2, max(0, len(usable) - MIN_POINTS)) :]
    if len(upper) < MIN_POINTS or upper[0][0] == upper[-1][0]:
        return None
    logs = ([math.log(value) for value in values] for values in zip(*upper, strict=True))
    return statistics.linear_regression(*logs).slope


def fits(cases: Sequence[Result]) -> list[Result]:
    """Exponents and largest size of every axis and provider in the cases of a growth file."""
    found: dict[tuple[str, str], list[Result]] = {}
    for case in cases:
        for name, entry in case["providers"].items():
            point = {"size": case["size"], "ms": entry["p50_ms"], "bytes": entry["peak_bytes"]}
            found.setdefault((case["axis"], name), []).append(point)
    return [
        {
            "axis": axis,
            "provider": name,
            "largest": max(point["size"] for point in points),
            "time": exponent([(point["size"], point["ms"]) for point in points]),
            "memory": exponent([(point["size"], point["bytes"] or 0) for point in points]),
        }
        for (axis, name), points in found.items()
    ]


def fit_table(growth: Sequence[Result], table: Table) -> str:
    """Exponents by size and provider."""
    rows = []
    for fit in growth:
        slopes = ["-" if fit[key] is None else f"{fit[key]:.2f}" for key in ("time", "memory")]
        rows.append([fit["axis"], fit["provider"], *slopes, f"{fit['largest']:,}"])
    header = ["size", "provider", "exponent of time", "exponent of memory", "largest size"]
    return table(header, rows)
