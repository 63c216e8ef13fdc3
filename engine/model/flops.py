"""Floating-point operations of a model with exits."""

from __future__ import annotations

from .encoder_layers import Flops, linear_entries
from .exit_policies import FixedLayer, Policy
from .exits import Exit, ExitModel, LinearExit
from .generic_layers import encoder_layers


def exit_flops(model: ExitModel, policy: Policy | None = None) -> list[Flops]:
    """Operations on a text that leaves at each of the exits, in their order.

    They include the layers up to the exit and every exit on the way that the policy reads; without
    a policy, every exit on the way.
    """
    layers = encoder_layers(model.backbone)
    learned = policy is not None and policy.needs_learned_exit
    spent = layers.embedding_flops()
    found = []
    first = 1
    for exit_layer, head in zip(model.exit_layers, model.exits.heads, strict=True):
        for layer in range(first, exit_layer + 1):
            spent += layers.flops(layer)
        first = exit_layer + 1
        is_last = exit_layer == model.exit_layers[-1]
        if policy is None or policy.reads(exit_layer) or is_last:
            spent += head_flops(head)
            if learned and not is_last:
                spent += Flops(per_text=2 * head.classifier.in_features)
        found.append(spent)
    return found


def full_flops(model: ExitModel) -> Flops:
    """Operations of the model up to its last exit, without the other exits."""
    return exit_flops(model, FixedLayer(model.exit_layers[-1]))[-1]


def head_flops(head: Exit) -> Flops:
    """Operations of one exit; the mha head computes the attention of the first token only."""
    classifier = 2 * linear_entries(head.classifier)
    if isinstance(head, LinearExit):
        return Flops(per_text=classifier)
    every_token = linear_entries(head.down_projection) + linear_entries(head.key_value)
    first_token = linear_entries(head.query) + linear_entries(head.output)
    return Flops(
        per_text=2 * first_token + classifier,
        per_token=2 * every_token + 4 * head.classifier.in_features,
    )
