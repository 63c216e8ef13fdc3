"""Search for the fastest tiles and implementation on this GPU, which are kept in a file.

    python -m fusedacl.kernels.tuning --help

Stores the fastest tile of each kernel, dtype and width, which `tiles.tuned` looks up, and whether
supcon_fused with these tiles or tiled is faster, which `tiles.measured_choices` looks up. A
training step never searches; without the file it uses the shipped tiles and the model of dispatch.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .contrastive.dispatch import TILED_ROWS
from .contrastive.gpu.tiles import (
    CHOICE,
    ONE_CHUNK,
    PADDED_ROWS,
    SCHEMA,
    Tile,
    cache_file,
    entries,
    entry_name,
    logger,
    read,
    read_choices,
    shipped,
    tuned,
)
from .contrastive.losses import supcon_loss
from .support.machine import capability, interpreting, triton_obstacle
from .support.names import check_name

DTYPES = {"float16": torch.float16, "float32": torch.float32}
WIDTHS = (64, 128, 256, 768)
NUM_ROWS = 16384
TEMPERATURE = 0.5
# A tile replaces another one if it saves this fraction of the time; less is noise.
WORTHWHILE = 0.02
# Relative to the largest value: sums differ in order, and the weights of pairs are float16.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Kernel:
    """A kernel that can be tuned: its shipped tile, and a launch with any tile."""

    name: str
    shipped: Tile
    launch: Callable[[Tile], Tensor]


# Returns the milliseconds of a call.
Timer = Callable[[Callable[[], Any]], float]


def store(found: dict[str, dict[str, Any]]) -> Path:
    """Add entries to the file, keeping those of processes that write at the same time."""
    # Triton, and so this command, exists on Linux only.
    import fcntl

    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        content = {"schema": SCHEMA, "entries": {**read(path), **found}}
        # A reader sees the old file or the new file, never an incomplete one.
        written = path.with_suffix(".tmp")
        written.write_text(json.dumps(content, indent=1), encoding="utf-8")
        written.replace(path)
    entries.cache_clear()
    tuned.cache_clear()
    read_choices.cache_clear()
    return path


def search(
    kernel: Kernel, width: int, timer: Timer, *, quick: bool = False
) -> tuple[Tile, dict[Tile, float]]:
    """Go from the shipped tile to its fastest neighbour, as long as that saves time.

    quick: try only those that the model of the shipped tiles puts next to them.
    Returns the fastest tile, and the milliseconds of all tiles that were tried.
    """
    expected = kernel.launch(kernel.shipped)
    times = {kernel.shipped: timer(lambda: kernel.launch(kernel.shipped))}
    best = kernel.shipped
    while True:
        for tile in runners_up(best) if quick else neighbours(best, width):
            if tile not in times:
                times[tile] = measure(kernel, tile, expected, timer)
        fastest = min(times, key=lambda tile: times[tile])
        gains = times[fastest] < (1 - WORTHWHILE) * times[best]
        best = fastest if gains else best
        if quick or not gains:
            return best, times


def measure(kernel: Kernel, tile: Tile, expected: Tensor, timer: Timer) -> float:
    """Return the milliseconds of a tile; infinity if it does not run or its result is wrong."""
    try:
        result = kernel.launch(tile)
    # Too little shared memory, or an error of the compiler: the tile does not suit this GPU.
    except Exception as error:
        logger.info("%s does not run with %s: %s", kernel.name, tile, error)
        return math.inf
    # A NaN is not <= anything.
    if not (result - expected).abs().max() <= TOLERANCE * expected.abs().max():
        logger.warning("%s gives a wrong result with %s: not taken", kernel.name, tile)
        return math.inf
    return timer(lambda: kernel.launch(tile))


def neighbours(tile: Tile, width: int) -> Iterator[Tile]:
    """Yield the tiles that differ in one number by one step."""
    of_rows, of_width = range(16, PADDED_ROWS + 1), range(16, min(width, ONE_CHUNK) + 1)
    allowed = {
        "rows": of_rows, "columns": of_rows, "chunk": of_width, "output": of_width,
        "num_warps": range(2, 9), "num_stages": range(1, 6),
    }  # fmt: skip
    for name, values in allowed.items():
        value = getattr(tile, name)
        steps = (value - 1, value + 1) if name == "num_stages" else (value // 2, 2 * value)
        for changed in steps:
            if changed in values:
                yield replace(tile, **{name: changed})


def runners_up(tile: Tile) -> Iterator[Tile]:
    """Yield the tile with another number of buffers, and with another number of rows."""
    yield replace(tile, num_stages=5 - tile.num_stages if tile.num_stages in (2, 3) else 3)
    # A block of rows reads all columns: half as many blocks read them half as often.
    yield replace(tile, rows=2 * tile.rows if 2 * tile.rows <= PADDED_ROWS else tile.rows // 2)


def time_implementations(
    device: torch.device, dtype: torch.dtype, width: int, num_rows: int, timer: Timer
) -> dict[str, float]:
    """Return the milliseconds, forward and backward, of supcon_fused and of tiled."""
    rows = torch.randn(num_rows, width, device=device).to(dtype).requires_grad_()
    labels = torch.arange(num_rows, device=device) % 16

    def step(impl: str) -> Tensor:
        loss = supcon_loss(rows, labels, temperature=TEMPERATURE, impl=impl)
        return torch.autograd.grad(loss, rows)[0]

    impls = {"supcon_fused": "triton", "tiled": "tiled"}
    return {name: timer(partial(step, impl)) for name, impl in impls.items()}


def tunable_kernels(
    device: torch.device, dtype: torch.dtype, width: int, num_rows: int
) -> list[Kernel]:
    """Return the kernels of `pair_sums`, on random rows of a padded width."""
    from .contrastive.gpu import pair_sums

    found = capability(device)
    assert found is not None, "main has checked"
    blocks = shipped(found, dtype, width)
    num_padded = pair_sums.padded(num_rows)
    z = torch.randn(1, num_padded, width, device=device)
    z = torch.nn.functional.normalize(z, dim=-1).to(dtype)
    shift = -pair_sums.exponent_scale(TEMPERATURE)
    shifts = torch.full((num_padded,), shift, device=device)
    shifts[num_rows:] = -torch.inf
    classes = torch.zeros(num_padded, dtype=torch.int32, device=device)
    u = torch.full((1, num_padded), 1 / num_rows, device=device)
    u[:, num_rows:] = 0
    options = (num_rows, TEMPERATURE, "all")

    def row_sums(tile: Tile) -> Tensor:
        return pair_sums.symmetric_row_sums(z, shifts, classes, *options, tile).total()

    def pair_gradient(tile: Tile) -> Tensor:
        return pair_sums.pair_gradient(z, u, shifts, classes, num_rows, *options, tile).sum(0)

    return [
        Kernel("row_sums", blocks.forward, row_sums),
        Kernel("pair_gradient", blocks.backward, pair_gradient),
    ]


def obstacle() -> str | None:
    """Return why tiles cannot be measured here, or None."""
    if interpreting():
        return "TRITON_INTERPRET=1 is set, and the interpreter's times mean nothing: unset it"
    if not torch.cuda.is_available():
        return "torch finds no GPU here (torch.cuda.is_available() is False)"
    device = torch.device("cuda")
    reason = triton_obstacle(device)
    if reason is None and (capability(device) or 0) < 80:
        return "the kernels that have tiles need compute capability 8.0 or newer"
    return reason


def gpu_timer(call: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, return_mode="median"))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fusedacl.kernels.tuning",
        description="Measure tiles on this GPU, and supcon_fused against tiled, and store the "
        f"fastest in a file; takes minutes per width. The file is {cache_file()} ($FUSEDACL_CACHE "
        "names another directory).",
    )
    parser.add_argument(
        "--dtype", nargs="+", default=["float16"], metavar="NAME",
        help="dtype of the unit rows: float16 for float16 and bfloat16 embeddings, float32 for "
        "float32 embeddings (default: float16)",
    )  # fmt: skip
    parser.add_argument(
        "--width", nargs="+", type=int, default=list(WIDTHS), metavar="NUMBER",
        help="width of the embeddings, in this order (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--rows", type=int, default=NUM_ROWS, metavar="NUMBER",
        help="number of rows of the measured batch (default: %(default)s); from "
        f"{TILED_ROWS} on, supcon_fused and tiled are compared too",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true",
        help="try only the three tiles of a kernel that the model ranks first",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    try:
        for name in arguments.dtype:
            check_name("--dtype", name, tuple(DTYPES))
    except ValueError as error:
        parser.error(str(error))
    for width in arguments.width:
        if not 1 <= width <= 1024:
            parser.error(f"--width is {width}: it must lie between 1 and 1024")
    if arguments.rows < 2:
        parser.error(f"--rows is {arguments.rows}: it must be at least 2")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    arguments = parse_arguments(argv)
    reason = obstacle()
    if reason is not None:
        print(f"cannot measure: {reason}", file=sys.stderr)
        return 2
    from .contrastive.gpu.pair_sums import padded_width

    device = torch.device("cuda", torch.cuda.current_device())
    for dtype in (DTYPES[name] for name in arguments.dtype):
        for width in dict.fromkeys(padded_width(width) for width in arguments.width):
            found = {}
            for kernel in tunable_kernels(device, dtype, width, arguments.rows):
                best, times = search(kernel, width, gpu_timer, quick=arguments.quick)
                found[entry_name(kernel.name, device, dtype, width)] = {
                    "tile": asdict(best),
                    "milliseconds": times[best],
                    "shipped_milliseconds": times[kernel.shipped],
                    "num_rows": arguments.rows,
                }
                numbers = ", ".join(f"{name} {number}" for name, number in asdict(best).items())
                print(
                    f"{kernel.name} {dtype} width {width}: {numbers}: {times[best]:.4g} ms; "
                    f"shipped tile {times[kernel.shipped]:.4g} ms; {len(times)} tiles tried"
                )
            # After each width, so that an interrupted search keeps its results.
            path = store(found)
            if arguments.rows >= TILED_ROWS:
                # With the tiles that were just stored.
                choice = time_implementations(device, dtype, width, arguments.rows, gpu_timer)
                name = min(choice, key=lambda name: choice[name])
                store(
                    {
                        entry_name(CHOICE, device, dtype, width): {
                            "implementation": name, "milliseconds": choice,
                            "num_rows": arguments.rows,
                        }
                    }
                )  # fmt: skip
                both = ", ".join(f"{name} {time:.4g} ms" for name, time in choice.items())
                print(f"{CHOICE} {dtype} width {width}: {both}: {name}")
    print(f"stored in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
