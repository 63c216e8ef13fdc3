"""Over which parameters the gate measures its angle: all, the top layers, or the head alone.

The paper measures it over all parameters. Over the last of them the second backward pass may stop
early, which is cheaper and no longer exact; the decision then holds for all parameters.
"""

from __future__ import annotations

from torch import nn
from torch.nn import Parameter

from .modeling import MultiExitForSequenceClassification


def parse_scope(scope: str) -> int | None:
    """Encoder layers from the top whose parameters count: None is all, 0 the head alone.

    Raises:
        ValueError: it is not all, head or top:K with K of at least 1.
    """
    if scope == "all":
        return None
    if scope == "head":
        return 0
    kind, _, number = scope.partition(":")
    if kind != "top" or not number.isdigit() or int(number) < 1:
        raise ValueError(
            f"gate_scope={scope!r} is not one of all, head, or top:K such as top:2 (the last two "
            "layers and the head)."
        )
    return int(number)


def scope_parameters(model: MultiExitForSequenceClassification, scope: str) -> list[Parameter]:
    """The trained parameters over which the angle is measured.

    `head`: those of the exits; `top:K`: those of the encoder's last K layers too.

    Raises:
        ValueError: no such scope, more layers than the encoder has, or none of it is trained.
    """
    num_top = parse_scope(scope)
    if num_top is None:
        chosen = list(model.parameters())
    else:
        chosen = list(model.exits.parameters())
        if num_top:
            layers = encoder_layers(model)
            if num_top > len(layers):
                raise ValueError(
                    f"gate_scope={scope}: the encoder has {len(layers)} layers. Use all, or "
                    f"top:{len(layers)} at most."
                )
            for layer in layers[-num_top:]:
                chosen += layer.parameters()
    trained = [parameter for parameter in chosen if parameter.requires_grad]
    if not trained:
        raise ValueError(f"gate_scope={scope}: none of these parameters is trained. Use all.")
    return trained


def encoder_layers(model: MultiExitForSequenceClassification) -> list[nn.Module]:
    """The encoder's layers, first to last: the list of as many equal modules as it has layers.

    Raises:
        ValueError: the encoder keeps its layers otherwise.
    """
    number = model.config.backbone_config.num_hidden_layers
    for module in model.backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return list(module)
    raise ValueError(
        f"gate_scope: no list of {number} layers is found in {type(model.backbone).__name__}. Use "
        "all or head."
    )
