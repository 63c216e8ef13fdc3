"""The interface between the trainer and the backend that runs its backward passes and steps."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.nn import Parameter

from ..objectives.gate import GateDecision
from ..objectives.losses import ExitLosses


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. Its tensors, of shape [], may still be being computed on the device.

    grad_norm: before clipping; not finite where the step was skipped.
    learning_rate, loss_scale: those that the step used.
    skipped: whether the gradient was not finite.
    decision: has one entry per group of the backend, in its order; None without the gate.
    """

    grad_norm: Tensor
    learning_rate: Tensor | float
    loss_scale: Tensor | float
    skipped: Tensor | bool
    decision: GateDecision | None


class Backend(Protocol):
    """Forward context, backward passes and one optimizer step; `LocalBackend` documents each."""

    @property
    def groups(self) -> Mapping[str, list[Parameter]]: ...

    @property
    def loss_scale(self) -> Tensor | float: ...

    def forward_context(self) -> AbstractContextManager[Any]: ...

    def backward(self, losses: ExitLosses) -> None: ...

    def step(self, *, compare: bool = False) -> StepReport: ...

    def check(self, loss_scale: float, skipped: bool) -> None:
        """Refuse a skipped step that a smaller loss scale cannot mend.

        Args: the values of the step's report, once they are on the host.

        Raises:
            FloatingPointError: the gradient is NaN or infinite.
        """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def full_state_dict(self) -> dict[str, Tensor]:
        """The model's weights, whole and in float32, on the CPU."""

    def close(self) -> None:
        """End training and give the model its weights back, whole and in float32."""
