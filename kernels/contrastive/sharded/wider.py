"""The wider losses over the samples of all ranks of a process group.

Samples, their labels, masks and temperatures are gathered, and so is every rank's memory, all of
which together are the memory of every anchor. A rank computes the sums over pairs of its own rows,
as for a plain batch; the sums over classes, which look at no pair, it computes for all rows.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..autograd import refuse_second_derivative, without_autocast
from ..batch import WiderBatch, by_sample
from ..wider import loss as by_pairs
from ..wider import pairs as over_pairs
from .batch import Spread, gather_parts
from .losses import NO_SECOND_DERIVATIVE, OwnRows, place


def contrastive_loss(name: str, spread: Spread, wider: WiderBatch) -> Tensor:
    """Return the loss of all ranks' samples by the implementation of that name."""
    everyone = gather_wider(spread, wider)
    if name == "reference":
        loss = reference.wider_loss(everyone)
    else:
        loss = by_pairs.contrastive_loss(
            name,
            everyone,
            partial(
                over_pairs.log_denominators, compute=partial(SharedLogDenominators.apply, spread)
            ),
        )
    return OwnRows.apply(loss, spread) if wider.batch.reduction == "none" else loss


def gather_wider(spread: Spread, wider: WiderBatch) -> WiderBatch:
    """Return the batch with the samples and memories of all ranks, after one or two all-gathers.

    The own samples and their temperatures get W times their gradient, which data-parallel training
    averages with that of ranks where they are constants.
    """
    batch, temperature = wider.batch, wider.temperature
    is_by_sample = False
    if isinstance(temperature, Tensor):
        # [1, N] of exits, since the number of all samples may be that of exits.
        temperature = by_sample(temperature, batch)
        is_by_sample = temperature.dim() > len(batch.leading)
    # The sample dimension comes first, so that a rank's samples are a slice.
    own = {"labels": batch.labels, "embeddings": batch.embeddings.movedim(-2, 0)}
    if batch.teacher_embeddings is not None:
        own["teacher_embeddings"] = batch.teacher_embeddings
    if wider.ignore_mask is not None:
        own["ignore_mask"] = wider.ignore_mask
    if isinstance(temperature, Tensor) and is_by_sample:
        own["temperature"] = temperature.movedim(-1, 0)
    gathered = dict(
        zip(
            own,
            gather_parts(spread, [part.detach() for part in own.values()], spread.num_samples),
            strict=True,
        )
    )
    for name, dimension in (("embeddings", -2), ("temperature", -1)):
        if name in own:
            placed = place(spread, own[name], gathered[name])
            gathered[name] = placed.movedim(0, dimension)
    memory, memory_labels = wider.memory_embeddings, wider.memory_labels
    if memory is not None and memory_labels is not None:
        counts = (memory.shape[0],) * spread.num_ranks
        memory, memory_labels = gather_parts(spread, [memory.detach(), memory_labels], counts)
    return wider._replace(
        batch=batch._replace(
            embeddings=gathered["embeddings"],
            temperature=smallest(batch.temperature, gathered.get("temperature")),
            labels=gathered["labels"],
            teacher_embeddings=gathered.get("teacher_embeddings"),
        ),
        temperature=gathered.get("temperature", temperature),
        ignore_mask=gathered.get("ignore_mask"),
        memory_embeddings=memory,
        memory_labels=memory_labels,
    )


def smallest(own: float, gathered: Tensor | None) -> float:
    """Return the smallest temperature of all ranks, on which the dtype depends, as far as known."""
    if gathered is None or gathered.device.type != "cpu" or gathered.numel() == 0:
        return own
    return min(own, float(gathered.detach().min()))


class SharedLogDenominators(torch.autograd.Function):
    """log D [E, A] as a function of z, of which the own rows get a gradient, and the scale.

    As `pairs.LogDenominators`, but a rank computes the sums of its own anchors.
    """

    @staticmethod
    def forward(ctx: Any, spread: Spread, z: Tensor, *arguments: Any) -> Tensor:
        pairs = over_pairs.Pairs(*arguments)
        own_first = torch.arange(pairs.z.shape[1], device=z.device)
        own_first[: pairs.num_anchors] = spread.own_first(z.device)
        ordered = pairs._replace(
            z=pairs.z.index_select(1, own_first),
            exists=pairs.exists.index_select(0, own_first),
            keys=pairs.keys.index_select(0, own_first),
            num_trained=spread.num_own_rows // spread.num_copies,
        )
        if pairs.by_row:
            of_anchors = own_first[: pairs.num_anchors]
            ordered = ordered._replace(scale=pairs.scale.index_select(1, of_anchors))
        _, trains_z, _, trains_scale, *_ = ctx.needs_input_grad
        own = ordered._replace(num_anchors=spread.num_own_rows)
        found, ctx.memory = over_pairs.denominators(own, trains_z, trains_scale, False)
        everyones = spread.gather_rows(torch.stack(found)).unbind()
        ctx.save_for_backward(own_first, *ordered[:4], *everyones)
        ctx.options, ctx.shape = ordered[4:], z.shape
        return over_pairs.logarithms(pairs, everyones[0])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative(NO_SECOND_DERIVATIVE)
        own_first, *tensors = ctx.saved_tensors
        ordered, found = over_pairs.Pairs(*tensors[:4], *ctx.options), tensors[4:]
        of_z = of_scale = None
        with without_autocast(upstream.device.type):
            if ctx.needs_input_grad[1]:
                memory, ctx.memory = ctx.memory, None
                anchors = own_first[: ordered.num_anchors]
                gradient = over_pairs.gradient(
                    ordered,
                    upstream.index_select(1, anchors),
                    found[0].index_select(1, anchors),
                    memory,
                )
                of_z = upstream.new_zeros(ctx.shape)
                of_z.index_copy_(1, own_first[: ordered.num_trained], gradient)
            if ctx.needs_input_grad[3]:
                of_scale = over_pairs.scale_gradient(ordered, upstream, *found)
        return None, of_z, None, of_scale, *(None,) * (2 + len(ctx.options))
