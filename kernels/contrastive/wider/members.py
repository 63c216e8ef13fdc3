"""Positives of a wider batch, as sums over classes: no pair is looked at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch import WiderBatch, count_classes, existing_rows, memberships_of
from ..tiled.loss import class_sums

# Sums over memberships are in float64, which holds products of float32 numbers. What a row shares
# with all others, as a part of what it shares with all, is rounding below this.
NOTHING_SHARED = 2.0**-40
# Up to this many classes products are faster than sums over rows, which no second thread takes.
FEW_CLASSES = 64


@dataclass(frozen=True)
class Members:
    """Classes of all rows: ids [R] or memberships [R, K], one of which may be None.

    exists: bool [R]. ids: int64, in [0, num_classes); num_classes for a row that does not exist.
    memberships: float64 or bool, 0 for such a row. Two rows share p_ij = y_i . y_j, 1 or 0 for ids.
    labels: the memberships that were given, where those of positives="each" are scaled, or ids.
    are_bools: whether labels were bools or integers.
    shared: float64 [A], the sum of p_ij over the others, of each anchor.
    anchor_weights: float64 [A], 0 for an anchor without a positive.
    """

    exists: Tensor
    num_classes: int
    ids: Tensor | None
    memberships: Tensor | None
    are_bools: bool
    labels: Tensor
    shared: Tensor
    anchor_weights: Tensor

    def positive_sums(self, values: Tensor, num_rows: int) -> Tensor:
        """Return sum_{j != i} p_ij values_j [.., num_rows, d] over the rows j of values."""
        num_values = values.shape[-2]
        if self.memberships is None:
            assert self.ids is not None, "one of the two is given"
            sums = class_sums(values, self.ids[:num_values], self.num_classes, self.ids[:num_rows])
            with_itself = self.exists[:, None].to(values.dtype)
        else:
            # What a row shares with itself may be far more than with all others, but not for bools.
            y = self.memberships[: max(num_values, num_rows)]
            y = y.to(values.dtype) if self.are_bools else y
            values = values.to(y.dtype)
            sums = y[:num_rows] @ (y[:num_values].mT @ values)
            with_itself = y[: min(num_values, num_rows)].square().sum(1, keepdim=True)
        both = min(num_values, num_rows)
        sums[..., :both, :].addcmul_(values[..., :both, :], with_itself[:both], value=-1)
        return sums


def find_members(wider: WiderBatch) -> Members:
    """Return the classes of all rows."""
    batch = wider.batch
    labels, memory_labels = batch.labels, wider.memory_labels
    num_classes = count_classes(wider)
    exists = existing_rows(wider)
    if labels.dim() == 1 and (memory_labels is None or memory_labels.dim() == 1):
        return members_by_id(wider, exists, num_classes)
    assert num_classes is not None, "memberships name the number of classes"
    parts = [memberships_of(labels, num_classes)]
    if batch.num_labels is not None:
        parts.append(torch.eye(num_classes, dtype=torch.float64, device=labels.device))
    parts *= batch.num_copies
    if memory_labels is not None:
        parts.append(memberships_of(memory_labels, num_classes))
    memberships = torch.cat(parts).masked_fill_(~exists[:, None], 0)
    anchors = slice(0, wider.num_anchors)
    given = [one for one in (labels, memory_labels) if one is not None]
    unscaled = memberships
    are_bools = not any(one.is_floating_point() for one in given)
    weights = wider.class_weights
    if wider.positives == "each":
        # Every label of a row is an anchor of its own: p_ij = sum_c w_c y_ic y_jc / (n_c - 1), so
        # that what an anchor shares is also its weight.
        num_others = memberships.sum(0) - 1
        factors = torch.where(num_others > 0.5, 1 / num_others, 0)
        if weights is not None:
            factors = factors * weights.double()
        memberships = memberships * factors.sqrt()
        shared = find_shared(memberships, anchors)
        return Members(exists, num_classes, None, memberships, are_bools, unscaled, shared, shared)
    shared = find_shared(memberships, anchors)
    anchor_weights = shared.sign()
    if weights is not None:
        of_anchors = memberships[anchors]
        total = of_anchors.sum(1).clamp(min=torch.finfo(torch.float64).tiny)
        anchor_weights = anchor_weights * (of_anchors @ weights.double()) / total
    return Members(
        exists, num_classes, None, memberships, are_bools, unscaled, shared, anchor_weights
    )


def find_shared(memberships: Tensor, anchors: slice) -> Tensor:
    """Return sum_{j != i} y_i . y_j of the anchors."""
    y = memberships[anchors]
    with_all = y @ memberships.sum(0)
    shared = with_all - y.square().sum(1)
    return torch.where(shared > NOTHING_SHARED * with_all, shared, 0)


def members_by_id(wider: WiderBatch, exists: Tensor, num_classes: int | None) -> Members:
    batch, memory_labels = wider.batch, wider.memory_labels
    integers = [batch.labels]
    if memory_labels is not None:
        integers.append(memory_labels)
    labels = torch.cat(integers)
    num_samples = batch.labels.shape[0]
    if num_classes is None:
        labels, num_classes = any_integers(labels, batch.ignore_index)
    else:
        # Where labels were not checked, one outside [0, K) stops at this operation's bounds.
        num_copied = wider.num_anchors - num_samples
        of_labels = torch.cat([exists[:num_samples], exists[num_samples + num_copied :]])
        every = torch.arange(num_classes, device=labels.device)
        labels = every.index_select(0, labels.masked_fill(~of_labels, 0))
    parts = [labels[:num_samples]]
    if batch.num_labels is not None:
        parts.append(torch.arange(batch.num_labels, device=labels.device))
    ids = torch.cat([*parts * batch.num_copies, labels[num_samples:]])
    ids = ids.masked_fill(~exists, num_classes)
    memberships = None
    if ids.device.type == "cpu" and num_classes <= FEW_CLASSES:
        memberships = ids[:, None] == torch.arange(num_classes, device=ids.device)
        num_members = torch.nn.functional.pad(memberships.sum(0), (0, 1)).double()
    else:
        num_members = torch.zeros(num_classes + 1, dtype=torch.float64, device=ids.device)
        num_members.index_put_((ids,), exists.double(), accumulate=True)
    anchor_ids = ids[: wider.num_anchors]
    shared = (num_members.index_select(0, anchor_ids) - 1).clamp_(min=0)
    anchor_weights = shared.clamp(max=1)
    if wider.class_weights is not None:
        weights = torch.nn.functional.pad(wider.class_weights.double(), (0, 1))
        anchor_weights = anchor_weights * weights.index_select(0, anchor_ids)
    return Members(exists, num_classes, ids, memberships, True, ids, shared, anchor_weights)


def any_integers(labels: Tensor, ignore_index: int) -> tuple[Tensor, int]:
    """Return ids that are equal where labels are, and the number of classes, which they are below.

    On the CPU small labels are ids as they are; others are replaced by the position of the first
    equal one in sorted order.
    """
    num_rows = labels.shape[0]
    if labels.device.type == "cpu" and num_rows and not torch.compiler.is_compiling():
        used = labels.masked_fill(labels == ignore_index, 0)
        smallest, largest = (int(bound) for bound in used.aminmax())
        if smallest >= 0 and largest < num_rows:
            return used, largest + 1
    return torch.searchsorted(labels.sort().values, labels), num_rows
