"""The answer that logits give, one class per text or the labels that apply, and its loss."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig

from ..config.sections import MULTI_LABEL

# Label of a text that counts in no loss; where texts have several labels, all K of them.
IGNORED = -100
# A label applies where its probability is larger, unless a command says otherwise.
LABEL_THRESHOLD = 0.5


def has_several_labels(config: PretrainedConfig) -> bool:
    """True if a text may have several labels, each of which has a probability of its own."""
    return config.problem_type == MULTI_LABEL


def probabilities_of(logits: Tensor, several: bool) -> Tensor:
    """Probabilities of classes, which add up to 1, or of several labels: [.., K]."""
    return torch.sigmoid(logits) if several else torch.softmax(logits, dim=-1)


def answers_of(logits: Tensor, several: bool, threshold: float = LABEL_THRESHOLD) -> Tensor:
    """The class int64 [..], or the labels that apply, bool [.., K], from logits [.., K]."""
    if not several:
        return logits.argmax(dim=-1)
    # The logit of the threshold: sigmoid would round.
    return logits > math.log(threshold / (1 - threshold))


def same_answers(one: Tensor, other: Tensor, several: bool) -> Tensor:
    """True for each text with the same class, or the same set of labels: bool [..]."""
    same = one == other
    return same.all(dim=-1) if several else same


def cross_entropies(
    logits: Tensor,
    labels: Tensor,
    *,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The cross-entropy of each text, [E, N], from float logits [E, N, K].

    labels [N]: classes. labels [N, K]: 1 for labels that apply, else 0; then it is the mean over
    the labels of the binary cross-entropies, as in transformers' BCEWithLogitsLoss. An `IGNORED`
    text has 0. Smoothing by s mixes a share s of equal probabilities into the labels.
    """
    num_exits, num_samples, num_labels = logits.shape
    if labels.dim() == 1:
        each = functional.cross_entropy(
            logits.view(-1, num_labels),
            labels.repeat(num_exits),
            weight=class_weights,
            ignore_index=IGNORED,
            reduction="none",
            label_smoothing=label_smoothing,
        )
        return each.view(num_exits, num_samples)
    targets = labels.to(logits.dtype)
    is_counted = (labels != IGNORED).all(dim=-1)
    if label_smoothing:
        targets = targets * (1 - label_smoothing) + label_smoothing / 2
    losses = functional.binary_cross_entropy_with_logits(
        logits, targets.expand_as(logits), reduction="none"
    )
    return losses.mean(dim=-1) * is_counted


def contrasted_labels(labels: Tensor, positives: str) -> dict[str, Any]:
    """The labels of a batch as arguments of the contrastive losses.

    positives: which texts are drawn together where they may have several labels.
    """
    if labels.dim() == 1:
        return {"labels": labels, "ignore_index": IGNORED}
    is_ignored = (labels == IGNORED).any(dim=-1)
    return {"labels": labels == 1, "ignore_mask": is_ignored, "positives": positives}


def training_loss(logits: Tensor, labels: Tensor, several: bool) -> Tensor:
    """The sum of the exits' mean cross-entropies, from logits [E, N, K].

    Raises:
        ValueError: the labels are no class indices, or no zeros and ones for each label.
    """
    num_exits, num_samples, num_labels = logits.shape
    if several:
        if labels.shape != (num_samples, num_labels):
            raise ValueError(
                f"labels has shape {list(labels.shape)}: the model gives each text any number of "
                f"{num_labels} labels, so it must hold zeros and ones, {[num_samples, num_labels]}."
            )
        return cross_entropies(logits, labels).mean(dim=1).sum()
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(
            f"labels has shape {list(labels.shape)} and dtype {labels.dtype}: it must hold one "
            f"class index per text, [N]; several labels per text need problem_type={MULTI_LABEL!r} "
            "in the model's configuration. Regression is not supported."
        )
    repeated = labels.repeat(num_exits)
    return num_exits * functional.cross_entropy(logits.flatten(0, 1), repeated)
