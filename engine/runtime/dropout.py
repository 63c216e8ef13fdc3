"""Dropout on a CPU in a quarter of PyTorch's time, most of which goes into random numbers.

PyTorch draws a number of 32 bits for each element, one after another; here four elements share one
of 64 bits. A probability is therefore a multiple of 2**-16, and kept elements are divided by one
minus that.
"""

import torch
from torch import Tensor, nn

_LEVELS = 2**16


class Dropout(nn.Dropout):
    """Module of the dropout below, also outside the training loops of this package."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x  # PyTorch's function copies it.
        dropped = dropout(x, self.p)
        return super().forward(x) if dropped is None else dropped


def dropout(
    x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor | None:
    """Return what `torch.nn.functional.dropout` does, or None where that must be called."""
    num_dropped = round(p * _LEVELS)
    is_mine = x.device.type == "cpu" and x.is_floating_point() and not inplace
    if not (training and is_mine and 0 < num_dropped < _LEVELS):
        return None
    return x * mask_of(x, num_dropped)


def mask_of(x: Tensor, num_dropped: int) -> Tensor:
    """Return a tensor like x of factors, 0 with a probability of num_dropped / 2**16."""
    # Four elements per number, from the whole range of int64: the sign bit must be random too.
    numbers = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    parts = numbers.view(torch.int16)[: x.numel()].view(x.shape)
    kept = parts >= num_dropped - _LEVELS // 2
    return kept.to(x.dtype).mul_(_LEVELS / (_LEVELS - num_dropped))
