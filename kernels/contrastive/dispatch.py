"""Choice of the implementation of the contrastive losses, with its reasons in words."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ..support.machine import capability, triton_obstacle
from . import reference
from .batch import Batch, WiderBatch, accumulate_dtype
from .gpu import tiles
from .tiled import loss as tiled
from .wider import compiled
from .wider import loss as wider

logger = logging.getLogger(__name__)

# The values of `impl`; "triton" is supcon_small or supcon_fused, by the number of rows.
IMPLEMENTATIONS = ("auto", "reference", "tiled", "triton")
# Up to this many rows one launch computes loss and gradient.
SMALL_ROWS = 256
# From this number of rows on a GPU computes longer than it takes to launch the kernels of "tiled".
TILED_ROWS = 2048


# What "supcon_fused" computes beyond a plain batch.
FUSED_NEEDS = (
    "labels [N, K]", "ignore_mask", "class_weights", "memory_embeddings", "memory_labels",
)  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """Properties of a batch that the choice depends on; num_rows: on this process alone."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    temperature: float = 0.5
    num_rows: int = 0
    width: int = 64
    num_ranks: int = 1
    # What makes it a `WiderBatch`, in words.
    needs: tuple[str, ...] = ()


def choose(impl: str, workload: Workload) -> str:
    """Return the implementation that runs: "reference", "tiled", "supcon_small" or "supcon_fused".

    On a GPU "auto" is "supcon_small" (one launch) for a small batch, else "supcon_fused" where
    Triton can use the matrix unit, unless `faster_tiles` knows better, else "tiled". On the CPU it
    is "tiled" wherever that can run: it was faster than "reference" at every size measured, by 1.1
    to 15 times without its compiled loop (float32, forward and backward, 34 to 4096 rows, one
    thread of an AVX-512 Xeon). ValueError says why another `impl` cannot run.
    """
    chosen, refused = decide(impl, workload)
    if not torch.compiler.is_compiling():
        log_once(impl, chosen, workload.device.type, workload.dtype, refused)
    return chosen


def decide(impl: str, workload: Workload) -> tuple[str, tuple[str, ...]]:
    """Return the choice, and why "auto" did not take the implementations that come before it."""
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
        if reason is not None:
            refused.append(f"{name} cannot run: {reason}")
            continue
        slower_because = faster_tiles(workload) if name == "supcon_fused" else None
        if slower_because is None:
            return name, tuple(refused)
        refused.append(f"{name} is not taken: {slower_because}")
    return "reference", tuple(refused)


def faster_tiles(workload: Workload) -> str | None:
    """Return why "tiled" is faster than "supcon_fused" on a GPU that can run both, or None.

    The tuning file of this GPU says so, else a model: a program of "supcon_fused" holds 256 columns
    of the gradient and computes all similarities again for the next 256. Ranks choose alike, so the
    number of rows, which may differ, does not count there.
    """
    dtype, width = workload.dtype, workload.width
    is_half = dtype in (torch.float16, torch.bfloat16)
    if is_half and workload.temperature < tiled.HALF_MIN_TEMPERATURE:
        # There "tiled" computes in float32.
        return None
    if workload.num_ranks == 1 and workload.num_rows < TILED_ROWS:
        return None
    unit = torch.float16 if is_half else torch.float32
    fastest = None
    for padded_width, name in tiles.measured_choices(workload.device, unit):
        if width <= padded_width:
            fastest = name
            break
    if fastest is not None:
        return None if fastest == "supcon_fused" else "tiled was faster, measured on this GPU"
    if not is_half or width <= tiles.ONE_CHUNK:
        return None
    return (
        f"by the model, not by measurement, tiled is faster for 16-bit rows wider than "
        f"{tiles.ONE_CHUNK} (python -m fusedacl.kernels.tuning measures both)"
    )


def triton_file(workload: Workload) -> str:
    """Return the Triton implementation; one launch cannot wait for other ranks' rows."""
    small = workload.num_rows <= SMALL_ROWS and workload.num_ranks == 1 and not workload.needs
    return "supcon_small" if small else "supcon_fused"


def obstacle(name: str, workload: Workload) -> str | None:
    """Return why an implementation cannot run, or None."""
    dtype, temperature = workload.dtype, workload.temperature
    if name == "tiled" and tiled.compute_dtype(temperature, dtype) is None:
        largest = tiled.MAX_EXPONENT[torch.float64]
        return (
            f"temperature {temperature} is below 1 / {largest:g}, where its unshifted "
            "exponentials leave float64's range (impl='reference' takes any temperature)"
        )
    if name not in ("supcon_small", "supcon_fused"):
        return None
    missing = [need for need in workload.needs if name == "supcon_small" or need not in FUSED_NEEDS]
    if missing:
        options = " and ".join(missing)
        return f"it does not compute {options} (impl='tiled' and impl='reference' do)"
    reason = triton_obstacle(workload.device)
    if reason is not None:
        return reason
    found = capability(workload.device)
    assert found is not None, "triton_obstacle has checked"
    return triton_module(name).obstacle(workload.width, dtype, temperature, found)


def triton_module(name: str) -> ModuleType:
    """Import a Triton implementation when it is needed: Triton may be absent."""
    if name == "supcon_small":
        from .gpu import small_batches

        return small_batches
    from .gpu import large_batches

    return large_batches


def loss_function(name: str) -> Callable[[Batch], Tensor]:
    """Return the function of the implementation that was chosen."""
    if name == "reference":
        return reference.contrastive_loss
    module = tiled if name == "tiled" else triton_module(name)
    return module.implementation.loss


def wider_function(name: str, batch: WiderBatch) -> Callable[[WiderBatch], Tensor]:
    """Return the function of the implementation that was chosen for a wider batch."""
    if name == "reference":
        return reference.wider_loss
    if name == "tiled" and compiled.takes(batch):
        return compiled.contrastive_loss
    return functools.partial(wider.contrastive_loss, name)


@functools.cache
def log_once(
    impl: str, chosen: str, device_type: str, dtype: torch.dtype, refused: tuple[str, ...]
) -> None:
    """Log one line per kind of call, not per call."""
    why = f" ({'; '.join(refused)})" if refused else ""
    logger.info(
        "contrastive loss, impl=%s, %s embeddings on %s: %s%s",
        impl, dtype, device_type, chosen, why,
    )  # fmt: skip


def explain(workload: Workload) -> str:
    """Describe in one line what impl="auto" chooses here, and why not the others."""
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
    elif chosen == "tiled" and precision == torch.float32:
        tile = f" ({tiled.describe_cpu()})"
    rows = f"{workload.num_rows} rows" if workload.num_rows else "any number of rows"
    if workload.num_ranks > 1:
        rows += f" on each of {workload.num_ranks} ranks"
    return (
        f"contrastive loss on {workload.device.type}, {rows}, {workload.dtype} embeddings: "
        f"{chosen}{tile}, computed in {precision}" + "".join(f"; {reason}" for reason in refused)
    )
