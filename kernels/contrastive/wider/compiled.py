"""Wider losses that the compiled loops of plain batches compute: a learned temperature, a memory.

A loss depends on rows and temperature only through s_ij = z_i . z_j / tau. Where every row is
trained, each pair's gradient therefore occurs in the products of both its rows:

    sum_i z_i . dz_i = 2 sum_ij s_ij ds_ij = -2 tau dtau

The normalization's gradient needs those products too, so that dtau costs no pass of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd import (
    NO_SECOND_DERIVATIVE,
    input_gradients,
    refuse_second_derivative,
    trained_inputs,
)
from ..batch import Batch, WiderBatch
from ..tiled import cpu_loop, cpu_triangle
from ..tiled.loss import batch_dtype, loop_for


def takes(wider: WiderBatch) -> bool:
    """Return whether a compiled loop computes this batch.

    One temperature and a memory must be all that makes it a wider one, and the temperature may
    learn only where every row is trained.
    """
    batch, temperature = wider.batch, wider.temperature
    others = (wider.label_temperature, wider.ignore_mask, wider.class_weights)
    labels = (batch.labels, wider.memory_labels)
    if (
        torch.compiler.is_compiling()
        or any(other is not None for other in others)
        or any(each is not None and each.dim() == 2 for each in labels)
        or (isinstance(temperature, Tensor) and temperature.dim() > 0)
    ):
        return False
    memory = wider.memory_embeddings
    if learns(temperature) and (memory is not None or batch.num_copies > 1):
        # The products of rows without a gradient are not known.
        return False
    if memory is None:
        return loop_for(batch) is not None
    return (
        batch.num_rows > 0
        and memory.dtype in cpu_loop.DTYPES
        and cpu_loop.can_run(batch, batch_dtype(batch))
        and cpu_triangle.is_fast()
    )


def learns(temperature: float | Tensor) -> bool:
    return isinstance(temperature, Tensor) and temperature.requires_grad and torch.is_grad_enabled()


def contrastive_loss(wider: WiderBatch) -> Tensor:
    """Return the loss, a scalar or [E], of a batch that `takes` accepts."""
    batch, memory = wider.batch, None
    if wider.memory_embeddings is not None:
        assert wider.memory_labels is not None, "check_memory has checked"
        memory = wider.memory_embeddings.detach(), wider.memory_labels
    # Autograd tells a Function which inputs need a gradient even where it is disabled.
    trained = (*trained_inputs(batch), learns(wider.temperature))
    return CompiledLoss.apply(
        batch, memory, trained, batch.embeddings, batch.label_embeddings, wider.temperature
    )


class CompiledLoss(torch.autograd.Function):
    """The loss as a function of samples, label embeddings and the temperature."""

    @staticmethod
    def forward(
        ctx: Any,
        batch: Batch,
        memory: tuple[Tensor, Tensor] | None,
        trained: tuple[bool, bool, bool],
        embeddings: Tensor,
        label_embeddings: Tensor | None,
        temperature: float | Tensor,
    ) -> Tensor:
        *trains_rows, trains_temperature = trained
        options = any(trained), trains_temperature
        if memory is not None:
            found = cpu_triangle.loss_and_gradient(batch, *options, memory)
        else:
            loop = loop_for(batch)
            assert loop is not None, "takes() has checked"
            found = loop.loss_and_gradient(batch, *options)
        ctx.shape, ctx.joint = batch.shape(*trains_rows), True
        ctx.save_for_backward(found.gradient if any(trains_rows) else None, found.products)
        ctx.dtype = temperature.dtype if isinstance(temperature, Tensor) else None
        return found.losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative(NO_SECOND_DERIVATIVE.format("this loss"))
        gradient, products = ctx.saved_tensors
        of_rows: tuple[Tensor | None, Tensor | None] = None, None
        if gradient is not None:
            factors = upstream[:, None, None] if upstream.dim() else upstream
            of_rows = input_gradients(ctx, [gradient * factors])
        of_temperature = None
        if products is not None:
            total = (products.sum(-1) * upstream).sum()
            of_temperature = (total / (-2 * ctx.shape.temperature)).to(ctx.dtype)
        return None, None, None, *of_rows, of_temperature
