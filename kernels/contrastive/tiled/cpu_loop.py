"""The contrastive loss of a small batch on the CPU: loss and gradient from one compiled call.

For float32 and up to MAX_ROWS rows, where cpu_loop.c was compiled at installation.
"""

import ctypes
import functools

import torch
from torch import Tensor

from ...support.c_loops import library
from ..batch import Batch, check_range

# All pairs of an exit are in memory at once, at most 1.6 MiB. Above this size cpu_triangle.c was
# faster at every width measured, by 1.04 to 2.7 times (forward + backward, widths 16 to 768, up to
# 1024 rows, one thread of a Xeon, AVX-512 or AVX2). With AVX-512 it is so from 364 rows on.
MAX_ROWS = 640
# Number of multiply-adds from which several threads are faster than one.
WORTH_THREADS = 4_000_000
# In the order of the enums of cpu_rows.h.
DENOMINATORS = ("all", "others", "negatives")
REDUCTIONS = ("mean", "sum")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (
    "num_exits", "num_samples", "num_labels", "num_copies", "width", "ignore_index", "denominator",
    "reduction",
)  # fmt: skip


class Problem(ctypes.Structure):
    """`struct problem` of cpu_rows.h, with the same fields."""

    _fields_ = (
        ("parts", ctypes.c_void_p * 4),
        ("dtypes", ctypes.c_int64 * 4),
        ("labels", ctypes.c_void_p),
        ("losses", ctypes.c_void_p),
        ("gradient", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in INTEGERS),
        ("temperature", ctypes.c_double),
    )


def takes(batch: Batch, dtype: torch.dtype) -> bool:
    """Return whether the compiled call computes the loss of this batch in this dtype."""
    return batch.num_rows <= MAX_ROWS and can_run(batch, dtype)


def can_run(batch: Batch, dtype: torch.dtype) -> bool:
    """Return whether a compiled loop can compute this batch in this dtype, whatever its size."""
    return (
        batch.embeddings.device.type == "cpu"
        and dtype == torch.float32
        and batch.reduction in REDUCTIONS
        and compiled_loop() is not None
    )


class Call:
    """A batch as a compiled loop reads it, and what the loop writes.

    losses: a scalar or [E]; gradient: [.., N + K, d] of the student's rows, or None.
    """

    def __init__(self, batch: Batch, with_gradient: bool) -> None:
        # Copies made here must live until the loop has returned.
        self.parts = [part.contiguous() for part in batch.parts]
        self.labels = batch.labels.long().contiguous()
        self.batch = batch
        *exits, num_samples, width = batch.embeddings.shape
        num_labels = batch.num_labels or 0
        new = functools.partial(torch.empty, dtype=torch.float32)
        self.losses = new(exits)
        self.gradient = new((*exits, num_samples + num_labels, width)) if with_gradient else None
        self.problem = Problem(
            tuple(part.data_ptr() for part in self.parts),
            tuple(DTYPES.index(part.dtype) for part in self.parts),
            self.labels.data_ptr(), self.losses.data_ptr(),
            None if self.gradient is None else self.gradient.data_ptr(),
            self.losses.numel(), num_samples, num_labels, batch.num_copies, width,
            batch.ignore_index, DENOMINATORS.index(batch.denominator),
            REDUCTIONS.index(batch.reduction), batch.temperature,
        )  # fmt: skip

    def check(self, position: int) -> None:
        """Raise ValueError for a label out of range, which a loop found at a position >= 0."""
        if position >= 0:
            check_range(self.labels, self.problem.num_labels, self.batch.ignore_index)


def loss_and_gradient(batch: Batch, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Return the loss, a scalar or [E], and its gradient [.., N + K, d] for the student's rows."""
    call, loop = Call(batch, with_gradient), compiled_loop()
    assert loop is not None, "takes() has checked"
    num_exits = call.losses.numel()
    num_threads = threads_for(batch, num_exits)
    size = min(num_threads, num_exits) * loop.supcon_scratch(call.problem)
    scratch = torch.empty(size, dtype=torch.float32)
    call.check(loop.supcon_loss(call.problem, scratch.data_ptr(), num_threads))
    return call.losses, call.gradient


def threads_for(batch: Batch, num_exits: int) -> int:
    """Return the number of threads that are worth starting for this batch."""
    num_rows = batch.num_rows
    num_trained = num_rows // batch.num_copies
    work = num_exits * num_rows * (num_rows + num_trained) * batch.embeddings.shape[-1]
    return torch.get_num_threads() if work >= WORTH_THREADS else 1


@functools.cache
def compiled_loop() -> ctypes.CDLL | None:
    """Load cpu_loop.c and cpu_triangle.c; None where the package was installed without them."""
    loop = library("contrastive.tiled._cpu_loop")
    if loop is not None:
        loop.supcon_scratch.argtypes = [ctypes.POINTER(Problem)]
        loop.supcon_loss.argtypes = [ctypes.POINTER(Problem), ctypes.c_void_p, ctypes.c_int64]
        loop.supcon_scratch.restype = loop.supcon_loss.restype = ctypes.c_int64
    return loop
