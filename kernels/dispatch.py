"""Which implementation runs where, and why, in words."""

import torch

from .rows import accumulate_dtype
from .supcon_tiled import MAX_EXPONENT, compute_dtype

IMPLEMENTATIONS = ("auto", "reference", "tiled", "triton")
NO_TRITON = "this version has no Triton kernels"


def obstacle(impl: str, dtype: torch.dtype, temperature: float) -> str | None:
    """What keeps `impl` from running on embeddings of this dtype, or None."""
    if impl == "triton":
        return NO_TRITON
    if impl == "tiled" and compute_dtype(temperature, dtype) is None:
        largest = MAX_EXPONENT[torch.float64]
        return (
            f"temperature {temperature} is below 1 / {largest:g}, where its unshifted "
            "exponentials leave float64's range (impl='reference' takes any temperature)"
        )
    return None


def choose(impl: str, dtype: torch.dtype, temperature: float) -> str:
    """The implementation that runs, "reference" or "tiled"; ValueError if `impl` cannot.

    "auto" is "tiled" wherever that can run, for it was the faster one at every size measured
    (float32, forward + backward, one thread of an AVX-512 Xeon; microseconds reference / tiled):
    34 rows of width 64: 343 / 314, of width 768: 540 / 467; 131 of 64: 624 / 438; 515 of 64:
    4068 / 1907; 11 exits of 34 rows: 740 / 512; 4096 of 64: 561000 / 38000.
    """
    if impl == "auto":
        return "reference" if obstacle("tiled", dtype, temperature) else "tiled"
    reason = obstacle(impl, dtype, temperature)
    if reason is not None:
        raise ValueError(f"impl={impl!r} cannot run: {reason}")
    return impl


def explain(
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    temperature: float = 0.5,
) -> str:
    """One line for people: what impl="auto" takes on this device, and why not the others."""
    chosen = choose("auto", dtype, temperature)
    if chosen == "tiled":
        reason = "the fastest at every size measured"
        precision = compute_dtype(temperature, dtype)
    else:
        reason = f"tiled cannot run: {obstacle('tiled', dtype, temperature)}"
        precision = accumulate_dtype(dtype)
    return (
        f"contrastive loss on {torch.device(device).type}, {dtype} embeddings: {chosen} "
        f"({reason}), computed in {precision}; triton cannot run: {NO_TRITON}"
    )
