"""The contrastive loss of a small batch on the CPU: loss and gradient from one compiled call.

For float32 and up to MAX_ROWS rows, where cpu_loop.c was compiled at installation.
"""

import ctypes
import functools

import torch
from torch import Tensor

from ...support.c_loops import library
from ..batch import Batch, check_range

# All pairs of an exit are in memory at once, at most 4 MiB. Up to this size the compiled call was
# faster than tiles in every case measured (forward + backward, two threads of an AVX2 EPYC), by 1.1
# to 5 times; with one thread 512 rows of width 768 were about equal.
MAX_ROWS = 1024
# Number of multiply-adds from which several threads are faster than one.
WORTH_THREADS = 4_000_000
# In the order of the enums of cpu_loop.c.
DENOMINATORS = ("all", "others", "negatives")
REDUCTIONS = ("mean", "sum")
INTEGERS = (
    "num_exits", "num_samples", "num_labels", "num_copies", "width", "ignore_index", "denominator",
    "reduction",
)  # fmt: skip


class Problem(ctypes.Structure):
    """`struct problem` of cpu_loop.c, with the same fields."""

    _fields_ = (
        ("parts", ctypes.c_void_p * 4),
        ("labels", ctypes.c_void_p),
        ("losses", ctypes.c_void_p),
        ("gradient", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in INTEGERS),
        ("temperature", ctypes.c_double),
    )


def takes(batch: Batch, dtype: torch.dtype) -> bool:
    """Return whether the compiled call computes the loss of this batch in this dtype."""
    return (
        batch.embeddings.device.type == "cpu"
        and dtype == torch.float32
        and batch.reduction in REDUCTIONS
        and batch.num_rows <= MAX_ROWS
        and compiled_loop() is not None
    )


def loss_and_gradient(batch: Batch, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Return the loss, a scalar or [E], and its gradient [.., N + K, d] for the student's rows."""
    # Copies made here must live until the calls have returned.
    samples, *others = (part.float().contiguous() for part in batch.parts)
    labels = batch.labels.long().contiguous()
    *exits, num_samples, width = samples.shape
    num_labels = batch.num_labels or 0
    num_trained = num_samples + num_labels
    losses = samples.new_empty(exits)
    gradient = samples.new_empty(*exits, num_trained, width) if with_gradient else None
    problem = Problem(
        tuple(part.data_ptr() for part in (samples, *others)),
        labels.data_ptr(), losses.data_ptr(), None if gradient is None else gradient.data_ptr(),
        losses.numel(), num_samples, num_labels, batch.num_copies, width, batch.ignore_index,
        DENOMINATORS.index(batch.denominator), REDUCTIONS.index(batch.reduction),
        batch.temperature,
    )  # fmt: skip
    loop = compiled_loop()
    assert loop is not None, "takes() has checked"
    work = losses.numel() * batch.num_rows * (batch.num_rows + num_trained) * width
    num_threads = torch.get_num_threads() if work >= WORTH_THREADS else 1
    scratch = samples.new_empty(min(num_threads, losses.numel()) * loop.supcon_scratch(problem))
    if loop.supcon_loss(problem, scratch.data_ptr(), num_threads) >= 0:
        check_range(labels, num_labels, batch.ignore_index)
    return losses, gradient


@functools.cache
def compiled_loop() -> ctypes.CDLL | None:
    """Load cpu_loop.c; None where the package was installed without it."""
    loop = library("contrastive.tiled._cpu_loop")
    if loop is not None:
        loop.supcon_scratch.argtypes = [ctypes.POINTER(Problem)]
        loop.supcon_loss.argtypes = [ctypes.POINTER(Problem), ctypes.c_void_p, ctypes.c_int64]
        loop.supcon_scratch.restype = loop.supcon_loss.restype = ctypes.c_int64
    return loop
