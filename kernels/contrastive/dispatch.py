"""Which implementation runs where, and why, in words."""

import functools
import logging
from dataclasses import dataclass

import torch

from ..support.machine import capability, triton_obstacle
from .batch import accumulate_dtype
from .tiled import loss as tiled

logger = logging.getLogger(__name__)

# What a user may ask for; "triton" is supcon_small or supcon_fused, by the number of rows.
IMPLEMENTATIONS = ("auto", "reference", "tiled", "triton")
# Up to here a batch goes to the kernel that does everything in one launch.
SMALL_ROWS = 256


@dataclass(frozen=True)
class Workload:
    """What the choice depends on: M rows of width d of one dtype on one device.

    num_rows is this process's; with num_ranks > 1 other processes hold further rows of the batch.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    temperature: float = 0.5
    num_rows: int = 0
    width: int = 64
    num_ranks: int = 1


def choose(impl: str, workload: Workload) -> str:
    """The implementation that runs, by the name of its file; ValueError if `impl` cannot.

    "auto" on a GPU is one launch for a small batch, else the fused kernels where Triton reaches the
    matrix unit, else "tiled". On the CPU it is "tiled" wherever that can run, for it was the faster
    one at every size measured, also without its compiled loop (float32, forward + backward, one
    thread of an AVX-512 Xeon; microseconds reference / tiled): 34 rows of width 64: 343 / 314, of
    width 768: 540 / 467; 131 of 64: 624 / 438; 515 of 64: 4068 / 1907; 11 exits of 34 rows: 740 /
    512; 4096 of 64: 561000 / 38000.
    """
    chosen, refused = decide(impl, workload)
    if not torch.compiler.is_compiling():
        log_once(impl, chosen, workload.device.type, workload.dtype, refused)
    return chosen


def decide(impl: str, workload: Workload) -> tuple[str, tuple[str, ...]]:
    """`choose`, and why what "auto" would have preferred cannot run."""
    if impl != "auto":
        name = triton_file(workload) if impl == "triton" else impl
        reason = obstacle(name, workload)
        if reason is not None:
            raise ValueError(f"impl={impl!r} cannot run: {reason}")
        return name, ()
    preferred = ["tiled"]
    if workload.device.type == "cuda":
        preferred.insert(0, "supcon_fused")
        if triton_file(workload) == "supcon_small":
            preferred.insert(0, "supcon_small")
    refused: list[str] = []
    for name in preferred:
        reason = obstacle(name, workload)
        if reason is None:
            return name, tuple(refused)
        refused.append(f"{name} cannot run: {reason}")
    return "reference", tuple(refused)


def triton_file(workload: Workload) -> str:
    """The Triton implementation meant for this number of rows.

    One launch cannot wait for other ranks' rows in its middle: with them it is supcon_fused.
    """
    small = workload.num_rows <= SMALL_ROWS and workload.num_ranks == 1
    return "supcon_small" if small else "supcon_fused"


def obstacle(name: str, workload: Workload) -> str | None:
    """What keeps an implementation from running this, or None."""
    dtype, temperature = workload.dtype, workload.temperature
    if name == "tiled" and tiled.compute_dtype(temperature, dtype) is None:
        largest = tiled.MAX_EXPONENT[torch.float64]
        return (
            f"temperature {temperature} is below 1 / {largest:g}, where its unshifted "
            "exponentials leave float64's range (impl='reference' takes any temperature)"
        )
    if name not in ("supcon_small", "supcon_fused"):
        return None
    reason = triton_obstacle(workload.device)
    if reason is not None:
        return reason
    found = capability(workload.device)
    assert found is not None, "triton_obstacle has looked"
    arguments = (workload.num_rows, workload.width, dtype, temperature, found)
    if name == "supcon_small":
        from .gpu import small_batches

        return small_batches.obstacle(*arguments)
    from .gpu import large_batches

    return large_batches.obstacle(*arguments)


@functools.cache
def log_once(
    impl: str, chosen: str, device_type: str, dtype: torch.dtype, refused: tuple[str, ...]
) -> None:
    """One line for each kind of call, not for each call."""
    why = f" ({'; '.join(refused)})" if refused else ""
    logger.info(
        "contrastive loss, impl=%s, %s embeddings on %s: %s%s",
        impl, dtype, device_type, chosen, why,
    )  # fmt: skip


def explain(workload: Workload) -> str:
    """One line for people: what impl="auto" takes here, and why not the others."""
    chosen, refused = decide("auto", workload)
    precision = accumulate_dtype(workload.dtype)
    if chosen == "tiled":
        precision = tiled.compute_dtype(workload.temperature, workload.dtype) or precision
    if workload.device.type != "cuda":
        reason = triton_obstacle(workload.device)
        refused += () if reason is None else (f"triton cannot run: {reason}",)
    tile = ""
    if chosen == "tiled" and workload.device.type == "cuda":
        size = workload.dtype.itemsize * tiled.GPU_TILE**2 / 2**20
        tile = f" with one tile of at most {size:g} MiB"
    rows = f"{workload.num_rows} rows" if workload.num_rows else "any number of rows"
    if workload.num_ranks > 1:
        rows += f" on each of {workload.num_ranks} ranks"
    return (
        f"contrastive loss on {workload.device.type}, {rows}, {workload.dtype} embeddings: "
        f"{chosen}{tile}, computed in {precision}" + "".join(f"; {reason}" for reason in refused)
    )
