"""The least time that a GPU's arithmetic and memory allow, for the loss and for the angle check.

    python -m fusedacl.benchmarks.floors.loss_and_gate [--markdown] [--published]

A pass over the M^2 pairs of the contrastive loss takes at least

    max(matrix FLOP / matrix rate, exponentials / exponential rate)

    rows:      forward 2 M^2 d FLOP and M^2 exponentials; backward 4 M^2 d and M^2
    triangle:  forward half of it, e being symmetric; backward the same
    tiles:     forward as triangle; backward recomputes half the pairs too: 2 M^2 d + M^2 d FLOP

and with forward and backward together at least the time of moving 3 M d elements and 4 M d bytes
(docs/kernels.md). The angle check reads two lists of gradients, the combination also writes one.

A floor assumes that products and exponentials overlap completely and that all exponentials are
the special function unit's; a CPU has the same units for both, and its floor is their sum. With a
GPU the rates are measured; else, and with --published, they are the vendors' figures, which no
program reaches.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..suites.gate.shapes import bert_shapes, num_elements
from .machine import measured
from .rates import CHIPS, DTYPE_NAMES, Rates

ALGORITHMS = ("rows", "triangle")
ROWS = (16384, 65536)
WIDTHS = (64, 128, 256, 768)
BERT = {
    "BERT-base": bert_shapes(num_layers=12),
    "BERT-large": bert_shapes(num_layers=24, hidden=1024),
}


@dataclass(frozen=True)
class PassFloor:
    """Seconds of the two units in one pass over the pairs."""

    matrix: float
    exponential: float
    overlaps: bool = True

    @property
    def seconds(self) -> float:
        longest = max(self.matrix, self.exponential)
        return longest if self.overlaps else self.matrix + self.exponential

    @property
    def bound_by(self) -> str:
        return "matrix unit" if self.matrix >= self.exponential else "exp"


@dataclass(frozen=True)
class LossFloor:
    """The passes, and the seconds in which the rows and their gradients move through memory."""

    forward: PassFloor
    backward: PassFloor
    memory: float

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return max(self.forward.seconds + self.backward.seconds, self.memory)

    @property
    def bound_by(self) -> str:
        """Of the two passes together, or memory."""
        passes = (self.forward, self.backward)
        if self.memory > sum(each.seconds for each in passes):
            return "memory"
        matrix, exponential = (
            sum(getattr(each, unit) for each in passes) for unit in ("matrix", "exponential")
        )
        return "matrix unit" if matrix >= exponential else "exp"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--markdown", action="store_true", help="tables for a page")
    parser.add_argument(
        "--published", action="store_true", help="the vendors' figures also where a GPU is"
    )
    arguments = parser.parse_args()
    rates = [chip.rates() for chip in CHIPS]
    if torch.cuda.is_available() and not arguments.published:
        rates = [measured(torch.device("cuda"))]
    print(page(rates, markdown=arguments.markdown))


def loss_floor(
    rates: Rates, num_rows: int, width: int, dtype: torch.dtype, algorithm: str = "rows"
) -> LossFloor | None:
    """The floor of one batch [M, d]; None where the chip has no product of that dtype."""
    if dtype not in rates.flops:
        return None
    pairs = num_rows**2
    forward = pairs if algorithm == "rows" else pairs / 2
    # The pairs whose product and exponential the backward pass computes again.
    again = pairs / 2 if algorithm == "tiles" else pairs
    flops = rates.flops[dtype]
    updates = 4 * pairs if algorithm != "tiles" else 2 * pairs + 2 * again
    moved = num_rows * width * (3 * dtype.itemsize + 4)
    overlaps = rates.overlaps_units
    return LossFloor(
        forward=PassFloor(2 * forward * width / flops, forward / rates.exponentials, overlaps),
        backward=PassFloor(updates * width / flops, again / rates.exponentials, overlaps),
        memory=moved / rates.bytes,
    )


def dot_norm_floor(rates: Rates, num_elements: int, itemsize: int) -> float:
    """Seconds: both lists are read."""
    return 2 * num_elements * itemsize / rates.bytes


def combine_floor(rates: Rates, num_elements: int, itemsize: int) -> float:
    """Seconds: both lists are read and one is written."""
    return 3 * num_elements * itemsize / rates.bytes


def page(rates: Sequence[Rates], *, markdown: bool) -> str:
    """All tables: the rates, the loss, the angle check."""
    parts = []
    for title, table in (
        ("Rates", rates_table(rates)),
        ("The contrastive loss", loss_table(rates)),
        ("The angle check", angle_table(rates)),
    ):
        parts += [f"## {title}" if markdown else title.upper(), "", format_table(table, markdown)]
        parts.append("")
    return "\n".join(parts).rstrip()


def rates_table(rates: Sequence[Rates]) -> list[list[str]]:
    rows = [["chip", *(f"{name}, TFLOP/s" for name in DTYPE_NAMES.values()), "Texp/s", "GB/s"]]
    for rate in rates:
        flops = [
            f"{rate.flops[dtype] / 1e12:.1f}" if dtype in rate.flops else "-"
            for dtype in DTYPE_NAMES
        ]
        rows.append(
            [rate.name, *flops, f"{rate.exponentials / 1e12:.2f}", f"{rate.bytes / 1e9:.0f}"]
        )
    return rows


def loss_table(rates: Sequence[Rates]) -> list[list[str]]:
    """Milliseconds; bfloat16 has float16's floor wherever it exists."""
    rows = [
        [
            "chip", "dtype", "M", "d", "forward, ms", "bound by", "forward by triangle, ms",
            "backward, ms", "bound by", "memory, ms",
        ]
    ]  # fmt: skip
    for rate in rates:
        for dtype in (torch.float16, torch.float32):
            for num_rows in ROWS:
                for width in WIDTHS:
                    floor = loss_floor(rate, num_rows, width, dtype)
                    half = loss_floor(rate, num_rows, width, dtype, "triangle")
                    if floor is None or half is None:
                        continue
                    rows.append(
                        [
                            rate.name, DTYPE_NAMES[dtype], str(num_rows), str(width),
                            milliseconds(floor.forward.seconds), floor.forward.bound_by,
                            milliseconds(half.forward.seconds),
                            milliseconds(floor.backward.seconds), floor.backward.bound_by,
                            milliseconds(floor.memory),
                        ]
                    )  # fmt: skip
    return rows


def angle_table(rates: Sequence[Rates]) -> list[list[str]]:
    rows = [
        ["chip", "gradients of", "dtype", "elements", "grad_dot_norm, ms", "gated_combine_, ms"]
    ]
    for rate in rates:
        for name, shapes in BERT.items():
            count = num_elements(shapes)
            rows += [
                [
                    rate.name, name, DTYPE_NAMES[dtype], f"{count:,}",
                    milliseconds(dot_norm_floor(rate, count, dtype.itemsize)),
                    milliseconds(combine_floor(rate, count, dtype.itemsize)),
                ]
                for dtype in (torch.float32, torch.float16)
            ]  # fmt: skip
    return rows


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"


def format_table(rows: list[list[str]], markdown: bool) -> str:
    """The first row is the header."""
    if markdown:
        rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    main()
