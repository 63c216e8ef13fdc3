"""The option `gate_scope`: the gradients on which the gate measures its angle.

    all     gradients of all trained parameters: exact, as in the paper; a second backward pass
    top:K   gradients of the last K encoder layers and the exit
    head    gradients of a linear map to the representation that the classifier and the contrastive
            loss read, from the hidden state that the exit reads (first token, or mean)

With top:K and head both losses are back-propagated down to the cut only; one pass continues below.
"""

from __future__ import annotations


def parse_scope(scope: str) -> int | None:
    """Return the number of encoder layers above the cut: None for all, 0 for head, K for top:K.

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
    """Describe a scope in words."""
    num_top = parse_scope(scope)
    if num_top is None:
        return "all trained parameters"
    if num_top == 0:
        return "a linear map to the representation that both losses read"
    layers = "layer" if num_top == 1 else f"{num_top} layers"
    return f"the last {layers} and the exit"
