"""The contrastive losses over the samples of all ranks of a process group.

Every rank has its samples, and the same label embeddings and teacher label embeddings. All rows of
the global batch (see `global_rows`) are anchors, positives and negatives, as if one process held
all samples. A rank computes the sums over pairs of its own rows with all rows, 1/W of the whole,
and the sums of the label embeddings, which are few, on every rank:

    gather the samples        [N, d]: the one large message
    D_i of the own rows       own rows x all rows
    gather D                  one number a row; now every rank knows all L_i
    gradient of the own rows  sum_j e_ij (u_i + u_j) y_j over all rows: e is symmetric, so the own
                              rows' gradient through other ranks' anchors needs only those u_j, and
                              nothing is sent back

The objective of W ranks whose gradients are averaged is the mean of what the ranks return. So for
"mean" and "sum" every rank returns the global loss L, the samples of a rank get W dL/dx, which
averaging divides by W, and label embeddings, whose gradient every rank computes whole, get dL/dl.
For "none" a rank returns the losses of its own rows. With upstream gradients g_r of rank r, row j
has the weight w_j = sum_r g_rj / W (a sample has one rank, a label embedding all); these weights
are gathered with D, in the backward pass.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import reference
from .batch import GlobalBatch, Spread, gather_batch

# temperature, denominator, reduction, ignore_index
Options = tuple[float, str, str, int]


def contrastive_loss(
    name: str,
    spread: Spread,
    embeddings: Tensor,
    labels: Tensor,
    label_embeddings: Tensor | None,
    teacher_embeddings: Tensor | None,
    teacher_label_embeddings: Tensor | None,
    temperature: float,
    denominator: str,
    reduction: str,
    ignore_index: int,
) -> Tensor:
    """The loss of all ranks' samples by the implementation of that name; see above.

    The arguments are this rank's, already checked and, by `global_rows.agree`, those of all ranks.
    """
    batch = gather_batch(spread, embeddings, labels, teacher_embeddings)
    options = (temperature, denominator, reduction, ignore_index)
    if name == "reference":
        return reference_loss(
            batch, embeddings, label_embeddings, teacher_label_embeddings, options
        )
    return GlobalLoss.apply(
        passes(name), batch, embeddings, label_embeddings, teacher_label_embeddings, options,
        torch.is_grad_enabled(),
    )  # fmt: skip


def passes(name: str) -> ModuleType:
    """The file with both passes of an implementation: `forward` and `backward`."""
    if name == "tiled":
        from . import tiled_passes

        return tiled_passes
    from . import gpu_passes

    return gpu_passes


class GlobalLoss(torch.autograd.Function):
    """Both passes over the own rows."""

    @staticmethod
    def forward(
        ctx: Any,
        file: ModuleType,
        batch: GlobalBatch,
        embeddings: Tensor,
        label_embeddings: Tensor | None,
        teacher_label_embeddings: Tensor | None,
        options: Options,
        grad_enabled: bool,
    ) -> Tensor:
        trained = ctx.needs_input_grad[2], ctx.needs_input_grad[3]
        loss, saved, ctx.known = file.forward(
            batch, label_embeddings, teacher_label_embeddings, *options,
            with_gradient=grad_enabled and any(trained), with_labels=trained[1],
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        ctx.backward = file.backward
        ctx.spread, ctx.leading = batch.spread, embeddings.shape[:-2]
        ctx.dtypes = (
            embeddings.dtype, None if label_embeddings is None else label_embeddings.dtype,
        )  # fmt: skip
        return loss

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if loss_gradient is None:
            return (None,) * 7
        if torch.is_grad_enabled():
            # Gradients of this gradient would leave the tiles out without a word.
            raise RuntimeError(
                "backward was called with create_graph=True: with a process_group only "
                "impl='reference' (reduction 'mean' or 'sum') can be differentiated twice"
            )
        samples, labels = ctx.backward(
            ctx.spread, loss_gradient, list(ctx.saved_tensors), ctx.known, *ctx.dtypes
        )
        return None, None, samples, labels, None, None, None


def reference_loss(
    batch: GlobalBatch,
    embeddings: Tensor,
    label_embeddings: Tensor | None,
    teacher_label_embeddings: Tensor | None,
    options: Options,
) -> Tensor:
    """Every rank computes the whole of `reference.contrastive_loss` and differentiates its part."""
    own, everyone = batch.spread.own_samples, batch.embeddings
    scaled = ScaleGradient.apply(embeddings, batch.spread.num_ranks)
    samples = torch.cat(
        [everyone[..., : own.start, :], scaled, everyone[..., own.stop :, :]], dim=-2
    )
    loss = reference.contrastive_loss(
        samples, batch.labels, label_embeddings, batch.teacher_embeddings,
        teacher_label_embeddings, *options,
    )  # fmt: skip
    return OwnRows.apply(loss, batch.spread) if options[2] == "none" else loss


class ScaleGradient(torch.autograd.Function):
    """x, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


class OwnRows(torch.autograd.Function):
    """The losses of the own rows [.., m] among all [.., M], whose gradient is that of all ranks."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, spread: Spread) -> Tensor:
        ctx.spread = spread
        return losses.index_select(-1, spread.own_rows(losses.device))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.spread.gather_rows(ctx.spread.mean_weights(gradient)), None
