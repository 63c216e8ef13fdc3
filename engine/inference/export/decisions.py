"""Decisions of exported graphs beside PyTorch's, apart from those that rounding may turn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ...model.exit_policies import Policy, make_policy
from .segments import Segment, follow

# A text whose signal lies at the threshold may leave in one runtime and stay in the other, and one
# whose two largest logits are equal may get either class; both are right. So decisions have to
# agree on clear texts only: those on which PyTorch decides alike with a threshold that is MARGIN
# higher or lower and with the largest logit twice MARGIN lower. MARGIN is relative to the largest
# logit where that is above 1; for a learned exit, to the terms of its score. It is ten times the
# error that is accepted of logits and states, which itself is a hundred times that of rounding.
MARGIN = 1e-3


@torch.no_grad()
def clear_texts(segment: Segment, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """True for each text whose decision, and whose class, no rounding turns: bool [N] each."""
    memory = dict(zip(segment.ports.inputs, inputs, strict=True))
    _, embeddings, logits = segment.read(memory)
    margin = MARGIN * max(1.0, float(logits.abs().max()))
    answers = logits.argmax(dim=-1)
    lowered = logits - 2 * margin * functional.one_hot(answers, logits.shape[-1])
    same_class = lowered.argmax(dim=-1) == answers
    if segment.is_last:
        return torch.ones_like(same_class), same_class
    if segment.learned_exit is not None:
        terms = (embeddings * segment.learned_exit.weight[0]).abs().sum(dim=-1)
        # A sigmoid is nowhere steeper than 1/4.
        margin = MARGIN * max(1.0, float(terms.max()) / 4)
    decided = []
    for policy in _moved(segment.policy, margin):
        for given in (logits, lowered):
            leaves, kept = policy.leaves(segment.reading(embeddings, given), memory)
            parts = [part.reshape(len(part), -1).long() for part in (leaves, *kept.values())]
            decided.append(torch.cat(parts, dim=1))
    same = torch.stack([(other == decided[0]).all(dim=-1) for other in decided]).all(dim=0)
    return same, same_class


@torch.no_grad()
def unexplained(
    segments: Sequence[Segment], inputs: tuple[Tensor, ...], layers: Tensor, others: Tensor
) -> Tensor:
    """True for each text that no rounding answers in these two ways: bool [N].

    inputs: of the first segment. layers, others [N]: where the text leaves either way; if that is
    the same layer, the classes differ.
    """
    remembers = any(segment.memory for segment in segments)
    explained = torch.zeros(len(layers), dtype=torch.bool)
    for segment in segments:
        clear, same_class = clear_texts(segment, inputs)
        # The ways part at the first of the layers, by a signal there or by one that is remembered.
        parting = torch.minimum(layers, others)
        here = parting >= segment.layer if remembers else parting == segment.layer
        explained |= ~clear & (layers != others) & here
        explained |= ~same_class & (layers == others) & (layers == segment.layer)
        inputs = follow(inputs, segment(*inputs))
    return ~explained


def _moved(policy: Policy, margin: float) -> list[Policy]:
    """A policy, and if it has a threshold, the same with that higher and lower."""
    threshold = policy.parameters.get("threshold")
    if threshold is None:
        return [policy]
    moved = (min(1.0, max(0.0, threshold + change)) for change in (0.0, -margin, margin))
    return [
        make_policy(policy.name, **{**policy.parameters, "threshold": value}) for value in moved
    ]
