"""The angle over a part of the model, of all processes together, before their one backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ....kernels import grad_dot_norm
from ...config.gate_scope import parse_scope
from ...model.multi_exit import MultiExitForSequenceClassification
from ...objectives.gate_cut import first_states, map_gradient, top_parameters
from ...runtime import processes
from .gradients import ZeroGradients


class SharedScope:
    """The two losses' gradients over a scope, as means over the processes: what `all` compares.

    Args:
        model: not yet DeepSpeed's; with `head`, what its last exit reads and makes is noted until
            `close`.
        scope: "top:K" or "head", as `parse_scope` reads it.

    Raises:
        ValueError: as for `top_layers`.
    """

    def __init__(self, model: MultiExitForSequenceClassification, scope: str) -> None:
        num_top = parse_scope(scope)
        self.parameters: list[Parameter] = []
        self._states: Tensor | None = None
        self._representations: Tensor | None = None
        self._handles = []
        if num_top:
            self.parameters = top_parameters(model, num_top)
        else:
            exit_: Any = model.exits[-1]
            # First, because ZeRO 3 hands modules other tensors than both losses come from.
            for module, note in ((exit_, self._note_states), (exit_.classifier, self._note)):
                self._handles.append(module.register_forward_pre_hook(note, prepend=True))
        # ZeRO 3 leaves empty tensors of the parameters.
        self.shapes = [parameter.shape for parameter in self.parameters]

    def _note_states(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._states = first_states(args)

    def _note(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._representations = args[0]

    def stats(
        self, gradients: ZeroGradients, main_loss: Tensor, auxiliary_loss: Tensor, impl: str
    ) -> Tensor:
        """`grad_dot_norm` of the two losses over the scope, [1, 3]. Collective.

        The losses carry what `accumulate` takes into account: the mean over the processes of their
        gradients is the step's.
        """
        both = torch.stack([self._flat(gradients, loss) for loss in (main_loss, auxiliary_loss)])
        self._states = self._representations = None
        if processes.world_size() > 1:
            torch.distributed.all_reduce(both)
            both /= processes.world_size()
        return grad_dot_norm([both[0]], [both[1]], impl=impl)

    def _flat(self, gradients: ZeroGradients, loss: Tensor) -> Tensor:
        """This process's gradient over the scope, in float32; zeros where there is none."""
        found: Sequence[Tensor | None]
        if self._representations is not None and self._states is not None:
            shapes = [self._representations.shape]
            found = gradients.peek(loss, [self._representations])
        else:
            shapes = self.shapes
            found = gradients.peek(loss, self.parameters)
        parts = [
            torch.zeros(shape, device=loss.device) if part is None else part.float()
            for part, shape in zip(found, shapes, strict=True)
        ]
        if self._states is not None:
            parts = [map_gradient(parts[0], self._states)]
        return torch.cat([part.flatten() for part in parts])

    def close(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
