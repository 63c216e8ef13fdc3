"""The angle over a part of the model, of all processes together, before the one backward pass."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from ...config.gate_scope import parse_scope
from ...model.multi_exit import MultiExitForSequenceClassification
from ...objectives.gate_cut import HeadInputs, map_gradient, shared_stats, top_parameters
from ...runtime import processes
from .gradients import ZeroGradients


class SharedScope:
    """The gradients of both losses over a scope, averaged over the processes.

    Args:
        model: not yet wrapped by DeepSpeed; with `head`, hooks note the inputs of its last exit
            until `close`.
        scope: "top:K" or "head", as `parse_scope` reads it.

    Raises:
        ValueError: as for `top_layers`.
    """

    def __init__(self, model: MultiExitForSequenceClassification, scope: str) -> None:
        num_top = parse_scope(scope)
        self.parameters: list[Parameter] = top_parameters(model, num_top) if num_top else []
        self._head = None if num_top else HeadInputs(model)
        # Noted here, because ZeRO 3 empties the tensors of the parameters.
        self.shapes = [parameter.shape for parameter in self.parameters]

    def stats(
        self, gradients: ZeroGradients, main_loss: Tensor, auxiliary_loss: Tensor, impl: str
    ) -> Tensor:
        """`grad_dot_norm` of the two losses over the scope, [1, 3]. Collective.

        The losses carry the factors that `accumulate` expects, so that the mean of their gradients
        over the processes is the gradient of the step.
        """
        flats = [self._flat(gradients, loss) for loss in (main_loss, auxiliary_loss)]
        if self._head is not None:
            self._head.forget()
        group = torch.distributed.group.WORLD if processes.world_size() > 1 else None
        return shared_stats(flats, group, impl)

    def _flat(self, gradients: ZeroGradients, loss: Tensor) -> Tensor:
        """The gradient of this process over the scope, in float32; zeros where there is none."""
        tensors: Sequence[Tensor] = self.parameters
        shapes = self.shapes
        if self._head is not None:
            assert self._head.representations is not None, "the model was called before"
            tensors, shapes = [self._head.representations], [self._head.representations.shape]
        found = gradients.peek(loss, tensors)
        parts = [
            torch.zeros(shape, device=loss.device) if part is None else part.float()
            for part, shape in zip(found, shapes, strict=True)
        ]
        if self._head is not None and self._head.states is not None:
            parts = [map_gradient(parts[0], self._head.states)]
        return torch.cat([part.flatten() for part in parts])

    def close(self) -> None:
        """Restore the model."""
        if self._head is not None:
            self._head.remove()
