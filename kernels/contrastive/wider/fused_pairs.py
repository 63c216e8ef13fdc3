"""Sums over pairs of a wider batch on the matrix unit, by the kernels of `gpu.pair_sums`.

Their exponentials are exp((z_i . z_j - 1) / temperature), which stay in range from the
`MIN_TEMPERATURE` of `gpu.tiles` on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gpu import large_batches
from ..gpu.pair_sums import (
    LOG2_E,
    padded,
    padded_width,
    pair_gradient,
    row_sums,
    symmetric_row_sums,
)  # fmt: skip


def sums(
    z: Tensor, exists: Tensor, keys: Tensor, temperature: float, denominator: str, num_anchors: int
) -> Tensor:
    """Return D_i exp(-1 / temperature) [E, A]; z [E, R, d] float16 or float32."""
    arguments = padded_rows(z, exists, keys, temperature)
    options, num_rows = (temperature, denominator), z.shape[1]
    tile = large_batches.tiles(arguments[0]).forward
    with torch.cuda.device_of(z):
        if num_anchors == num_rows:
            return symmetric_row_sums(*arguments, num_rows, *options, tile).total()
        return row_sums(*arguments, num_anchors, num_rows, *options, tile).sum(0)


def gradient(
    z: Tensor,
    u: Tensor,
    exists: Tensor,
    keys: Tensor,
    temperature: float,
    denominator: str,
    num_trained: int,
) -> Tensor:
    """Return sum_j e_ij (u_i + u_j) z_j over j != i [E, n, d] for u [E, R], by the same e as D."""
    unit_rows, shifts, classes = padded_rows(z, exists, keys, temperature)
    weights = u.new_zeros(unit_rows.shape[:2])
    weights[:, : u.shape[1]] = u
    with torch.cuda.device_of(z):
        partial_gradients = pair_gradient(
            unit_rows, weights, shifts, classes, num_trained, z.shape[1], temperature, denominator,
            large_batches.tiles(unit_rows).backward,
        )  # fmt: skip
    return partial_gradients.sum(0)[..., : z.shape[2]]


def padded_rows(
    z: Tensor, exists: Tensor, keys: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return z, shifts and classes as `pair_sums` reads them."""
    num_exits, num_rows, width = z.shape
    rows = z.new_zeros(num_exits, padded(num_rows), padded_width(width))
    rows[:, :num_rows, :width] = z
    shifts = torch.full(rows.shape[1:2], -torch.inf, dtype=torch.float32, device=z.device)
    shifts[:num_rows] = torch.where(exists > 0, -LOG2_E / temperature, -torch.inf)
    classes = torch.zeros_like(shifts, dtype=torch.int32)
    if keys.dim() == 1:
        classes[:num_rows] = keys
    return rows, shifts, classes
