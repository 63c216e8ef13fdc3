"""The contrastive loss of a small batch on the CPU: loss and gradient from one compiled call.

Python's side of cpu_loop.c. `supcon_tiled` comes here where `takes` says so: with a compiler at
installation, in float32, up to MAX_ROWS rows.
"""

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ...support.c_loops import library
from ..batch import check_range

# All pairs of an exit are there at once, here 4 MiB. Up to here this was faster than tiles at every
# size measured (forward + backward, two threads of an AVX2 EPYC; milliseconds here / by tiles): 34
# rows of width 64: 0.23 / 0.60; 512 of 768: 6.7 / 7.7; 1024 of 64: 2.5 / 5.0, of 768: 24 / 30; 12
# exits of 182 rows of 64: 1.3 / 6.2. With one thread 512 rows of 768 were about equal: 12.3 / 11.8.
MAX_ROWS = 1024
# Multiply-adds from which threads are worth waking.
WORTH_THREADS = 4_000_000
# As in cpu_loop.c.
DENOMINATORS = ("all", "others", "negatives")
REDUCTIONS = ("mean", "sum")


class Problem(ctypes.Structure):
    """`struct problem` of cpu_loop.c, field by field."""

    _fields_ = (
        ("parts", ctypes.c_void_p * 4),
        ("labels", ctypes.c_void_p),
        ("losses", ctypes.c_void_p),
        ("gradient", ctypes.c_void_p),
        ("num_exits", ctypes.c_int64),
        ("num_samples", ctypes.c_int64),
        ("num_labels", ctypes.c_int64),
        ("num_copies", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("ignore_index", ctypes.c_int64),
        ("denominator", ctypes.c_int64),
        ("reduction", ctypes.c_int64),
        ("temperature", ctypes.c_double),
    )


def takes(parts: Sequence[Tensor], dtype: torch.dtype | None, reduction: str) -> bool:
    """Whether the compiled call computes the loss of these parts in this dtype."""
    return (
        parts[0].device.type == "cpu"
        and dtype == torch.float32
        and reduction in REDUCTIONS
        and sum(part.shape[-2] for part in parts) <= MAX_ROWS
        and compiled_loop() is not None
    )


def loss_and_gradient(
    embeddings: Tensor,
    labels: Tensor,
    label_embeddings: Tensor | None,
    teacher_embeddings: Tensor | None,
    teacher_label_embeddings: Tensor | None,
    temperature: float,
    denominator: str,
    reduction: str,
    ignore_index: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """The loss, a scalar or [E], and its gradient [.., N + K, d] with respect to the first rows.

    Raises:
        ValueError: a label outside [0, K).
    """
    # What is converted or copied here has to live until the calls have returned.
    samples, *others = [
        None if part is None else part.float().contiguous()
        for part in (embeddings, label_embeddings, teacher_embeddings, teacher_label_embeddings)
    ]
    assert samples is not None
    labels = labels.long().contiguous()
    *exits, num_samples, width = samples.shape
    num_labels = 0 if label_embeddings is None else label_embeddings.shape[-2]
    losses = samples.new_empty(exits)
    gradient = samples.new_empty(*exits, num_samples + num_labels, width) if with_gradient else None
    num_copies = 1 if teacher_embeddings is None else 2
    problem = Problem(
        tuple(map(address, (samples, *others))),
        address(labels), address(losses), address(gradient),
        losses.numel(), num_samples, num_labels, num_copies, width, ignore_index,
        DENOMINATORS.index(denominator), REDUCTIONS.index(reduction), temperature,
    )  # fmt: skip
    loop = compiled_loop()
    assert loop is not None, "takes() has looked"
    num_trained = num_samples + num_labels
    num_rows = num_copies * num_trained
    work = losses.numel() * num_rows * (num_rows + num_trained) * width
    num_threads = torch.get_num_threads() if work >= WORTH_THREADS else 1
    scratch = samples.new_empty(min(num_threads, losses.numel()) * loop.supcon_scratch(problem))
    if loop.supcon_loss(problem, scratch.data_ptr(), num_threads) >= 0:
        check_range(labels, num_labels, ignore_index)
    return losses, gradient


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def compiled_loop() -> ctypes.CDLL | None:
    """cpu_loop.c, or None where the package was installed without it."""
    loop = library("contrastive.tiled._cpu_loop")
    if loop is not None:
        loop.supcon_scratch.argtypes = [ctypes.POINTER(Problem)]
        loop.supcon_loss.argtypes = [ctypes.POINTER(Problem), ctypes.c_void_p, ctypes.c_int64]
        loop.supcon_scratch.restype = loop.supcon_loss.restype = ctypes.c_int64
    return loop
