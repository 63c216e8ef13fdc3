"""The contrastive loss of a small batch on the CPU: loss and gradient from one compiled call.

For float32 and up to MAX_ROWS rows, where cpu_loop.c was compiled at installation.
"""

import ctypes
import functools
from typing import NamedTuple

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
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
INTEGERS = (
    "num_exits", "num_samples", "num_labels", "num_copies", "num_memory", "width", "ignore_index",
    "denominator", "reduction",
)  # fmt: skip


class Problem(ctypes.Structure):
    """`struct problem` of cpu_rows.h, with the same fields."""

    _fields_ = (
        ("parts", ctypes.c_void_p * 5),
        ("dtypes", ctypes.c_int64 * 5),
        ("labels", ctypes.c_void_p),
        ("losses", ctypes.c_void_p),
        ("gradient", ctypes.c_void_p),
        ("products", ctypes.c_void_p),
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


class Outputs(NamedTuple):
    """Results of a compiled loop.

    losses: a scalar or [E]. gradient: [.., N + K, d] of the student's rows, or None. products:
    [.., N + K], y . G of these rows in the notation of loss.py, or None.
    """

    losses: Tensor
    gradient: Tensor | None
    products: Tensor | None


class Call:
    """A batch as a compiled loop reads it, its outputs, and the number of threads worth starting.

    memory: rows [Q, d] and labels [Q], constants that are no anchors.
    """

    def __init__(
        self,
        batch: Batch,
        with_gradient: bool,
        with_products: bool,
        memory: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        labels, num_memory = batch.labels.long(), 0
        # Copies made here must live until the loop has returned.
        self.parts = parts = [part.contiguous() for part in batch.parts]
        addresses: list[int | None] = [part.data_ptr() for part in parts]
        dtypes = [DTYPES[part.dtype] for part in parts]
        if memory is not None:
            rows = memory[0].contiguous()
            missing = 4 - len(parts)
            addresses += [None] * missing + [rows.data_ptr()]
            dtypes += [0] * missing + [DTYPES[rows.dtype]]
            parts.append(rows)
            labels, num_memory = torch.cat([labels, memory[1].long()]), rows.shape[0]
        self.labels = labels.contiguous()
        self.batch = batch
        *exits, num_samples, width = batch.embeddings.shape
        self.num_exits = exits[0] if exits else 1
        num_labels, num_copies = batch.num_labels or 0, batch.num_copies
        num_trained = num_samples + num_labels
        self.num_rows = num_copies * num_trained + num_memory
        work = self.num_exits * (num_copies + 1) * num_trained * self.num_rows * width
        self.num_threads = torch.get_num_threads() if work >= WORTH_THREADS else 1
        self.outputs = Outputs(
            floats(*exits),
            floats(*exits, num_trained, width) if with_gradient else None,
            floats(*exits, num_trained) if with_products else None,
        )
        self.problem = Problem(
            tuple(addresses),
            tuple(dtypes),
            self.labels.data_ptr(),
            *[None if output is None else output.data_ptr() for output in self.outputs],
            self.num_exits, num_samples, num_labels, num_copies, num_memory, width,
            batch.ignore_index, DENOMINATORS.index(batch.denominator),
            REDUCTIONS.index(batch.reduction), batch.temperature,
        )  # fmt: skip

    def check(self, position: int) -> None:
        """Raise ValueError for a label out of range, which a loop found at a position >= 0."""
        if position >= 0:
            check_range(self.labels, self.problem.num_labels, self.batch.ignore_index)


def floats(*shape: int) -> Tensor:
    # Not on the default device, which may be another one.
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def loss_and_gradient(batch: Batch, with_gradient: bool, with_products: bool = False) -> Outputs:
    """Compute the loss and, where they are wanted, its gradient and its products."""
    call, loop = Call(batch, with_gradient, with_products), compiled_loop()
    assert loop is not None, "takes() has checked"
    scratch = floats(min(call.num_threads, call.num_exits) * loop.supcon_scratch(call.problem))
    call.check(loop.supcon_loss(call.problem, scratch.data_ptr(), call.num_threads))
    return call.outputs


@functools.cache
def compiled_loop() -> ctypes.CDLL | None:
    """Load cpu_loop.c and cpu_triangle.c; None where the package was installed without them."""
    loop = library("contrastive.tiled._cpu_loop")
    if loop is not None:
        loop.supcon_scratch.argtypes = [ctypes.POINTER(Problem)]
        loop.supcon_loss.argtypes = [ctypes.POINTER(Problem), ctypes.c_void_p, ctypes.c_int64]
        loop.supcon_scratch.restype = loop.supcon_loss.restype = ctypes.c_int64
    return loop
