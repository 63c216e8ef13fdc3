"""What the trainer needs of an engine, whichever it drives."""

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
    """One optimizer step. `grad_norm` is before clipping; `learning_rate` is the one it used.

    `decision` has one entry a group of the engine, in its order.
    """

    grad_norm: float
    learning_rate: float
    loss_scale: float
    skipped: bool
    decision: GateDecision | None


class Engine(Protocol):
    """Forward context, two backward passes, one optimizer step; `LocalEngine` documents each."""

    @property
    def groups(self) -> Mapping[str, list[Parameter]]: ...

    @property
    def loss_scale(self) -> float: ...

    def forward_context(self) -> AbstractContextManager[Any]: ...

    def backward(self, losses: ExitLosses, share: float = 1.0) -> None: ...

    def step(self, *, compare: bool = False) -> StepReport: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def full_state_dict(self) -> dict[str, Tensor]:
        """The model's weights, whole and in float32, on the CPU."""

    def close(self) -> None:
        """End training and give the model its weights back, whole and in float32."""
