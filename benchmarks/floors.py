"""The least time that a GPU's arithmetic and memory allow, for the loss and for the angle check.

    python -m fusedacl.benchmarks.floors [--markdown] [--published]

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

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .shapes import bert_shapes, num_elements

# 32-bit results per clock and multiprocessor of ex2, the same from 7.0 to 9.0: CUDA C++ Programming
# Guide, "Throughput of Native Arithmetic Instructions".
EXPONENTIALS_PER_CLOCK = 16
# A float32 product with the matrix unit is three tf32 products (Triton's "tf32x3").
TF32_PRODUCTS = 3

ALGORITHMS = ("rows", "triangle")
ROWS = (16384, 65536)
WIDTHS = (64, 128, 256, 768)
BERT = {
    "BERT-base": bert_shapes(num_layers=12),
    "BERT-large": bert_shapes(num_layers=24, hidden=1024),
}
DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Rates:
    """What a floor is computed from, per second; a dtype without a product rate is absent."""

    name: str
    flops: dict[torch.dtype, float]
    exponentials: float
    bytes: float
    # A CPU's products and exponentials are the same units' work.
    overlaps_units: bool = True


@dataclass(frozen=True)
class Floor:
    """The least seconds, and what sets them."""

    seconds: float
    bound_by: str


@dataclass(frozen=True)
class Chip:
    """A vendor's figures: dense rates, products of 16 bits accumulated in float32.

    clock_ghz: the highest clock at which the vendor states a rate.
    """

    name: str
    num_multiprocessors: int
    clock_ghz: float
    half_tflops: float
    tf32_tflops: float | None
    float32_tflops: float
    gigabytes_per_second: float
    has_bfloat16: bool = True

    def rates(self) -> Rates:
        emulated = (self.tf32_tflops or 0) / TF32_PRODUCTS
        flops = {
            torch.float16: self.half_tflops * 1e12,
            torch.float32: max(emulated, self.float32_tflops) * 1e12,
        }
        if self.has_bfloat16:
            flops[torch.bfloat16] = flops[torch.float16]
        exponentials = self.num_multiprocessors * EXPONENTIALS_PER_CLOCK * self.clock_ghz * 1e9
        return Rates(self.name, flops, exponentials, self.gigabytes_per_second * 1e9)


CHIPS = (
    # NVIDIA Tesla V100 GPU Architecture (whitepaper WP-08608), SXM2.
    Chip("V100 SXM2", 80, 1.530, 125, None, 15.7, 900, has_bfloat16=False),
    # NVIDIA Turing GPU Architecture (whitepaper WP-09183), Tesla T4; bandwidth: T4 data sheet.
    Chip("T4", 40, 1.590, 65, None, 8.1, 320, has_bfloat16=False),
    # NVIDIA A100 Tensor Core GPU Architecture (whitepaper); bandwidth: A100 80GB data sheet, SXM.
    Chip("A100 SXM 80GB", 108, 1.410, 312, 156, 19.5, 2039),
    # NVIDIA A10 data sheet; 72 multiprocessors: 9216 CUDA cores.
    Chip("A10", 72, 1.695, 125, 62.5, 31.2, 600),
    # NVIDIA L4 data sheet, without sparsity; 58 multiprocessors: 7424 CUDA cores.
    Chip("L4", 58, 2.040, 121, 60, 30.3, 300),
    # NVIDIA Ada GPU Architecture (whitepaper), RTX 4090, FP32 accumulate.
    Chip("RTX 4090", 128, 2.520, 165.2, 82.6, 82.6, 1008),
    # NVIDIA H100 Tensor Core GPU Architecture (whitepaper), SXM5; its float32 rate is at 1.98 GHz.
    Chip("H100 SXM", 132, 1.980, 989.4, 494.7, 66.9, 3350),
    # NVIDIA H200 data sheet, SXM: the H100's processor with faster memory.
    Chip("H200 SXM", 132, 1.980, 989.4, 494.7, 66.9, 4800),
)


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


def measured(device: torch.device) -> Rates:
    """The rates of the machine at hand, instead of its vendor's."""
    if device.type == "cpu":
        from . import cpu_rates

        return cpu_rates.measured()
    from . import rates

    return rates.measured(device)


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
