"""`gate_scope`: over what the gate's angle is measured, and with which other options it can be.

    all     over all trained parameters: exact, the paper's; a second backward pass
    top:K   over the last K encoder layers and the exit
    head    at the representation that the classifier and the contrastive loss read, as a linear
            map from the text's first state to it would see the two gradients

With the last two both losses are back-propagated down to the cut only; one pass goes on from there.
Nothing here imports torch: a mistake on the command line is told at once.
"""

from __future__ import annotations


def parse_scope(scope: str) -> int | None:
    """Encoder layers above the cut: None is all of the model, 0 the classifier alone.

    Raises:
        ValueError: it is not all, head or top:K with K of at least 1.
    """
    if scope == "all":
        return None
    if scope == "head":
        return 0
    kind, _, number = scope.partition(":")
    if kind != "top" or not (number.isascii() and number.isdigit()) or int(number) < 1:
        raise ValueError(
            f"gate_scope={scope!r} is not one of all, head, or top:K such as top:2 (the last two "
            "layers and the exit)."
        )
    return int(number)


def scope_words(scope: str) -> str:
    """A scope, in words for people."""
    num_top = parse_scope(scope)
    if num_top is None:
        return "all trained parameters"
    if num_top == 0:
        return "the representations that both losses read"
    layers = "layer" if num_top == 1 else f"{num_top} layers"
    return f"the last {layers} and the exit"
