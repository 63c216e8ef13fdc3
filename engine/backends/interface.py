"""The interface between the trainer and the backend that runs its backward passes and steps."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..config.training import TrainingConfig
from ..model.multi_exit import MultiExitForSequenceClassification
from ..objectives.gate import GateDecision
from ..objectives.losses import ExitLosses
from ..runtime.device import choose_dtype
from .loss_scaling import DeepSpeedLossScaler, LossScaler


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. Its tensors have shape []; the device may not have computed them yet.

    grad_norm: before clipping; not finite where the step was skipped.
    learning_rate, loss_scale: those that the step used.
    skipped: whether the gradient was not finite.
    decision: one entry per group of the backend, in its order; None without the gate.
    """

    grad_norm: Tensor
    learning_rate: Tensor | float
    loss_scale: Tensor | float
    skipped: Tensor | bool
    decision: GateDecision | None


@dataclass(eq=False, repr=False)
class Backend(ABC):
    """Forward context, backward passes and one optimizer step.

    Args:
        model: on its device already; parameters without requires_grad are left alone. It needs
            exits only where `gate_scope` is not all.
        num_steps: optimizer steps of the whole schedule.
        groups: name -> parameters; the angle check decides for each group.
        independent: the groups are models of their own, so each is clipped by its own norm;
            otherwise the norm of all groups together is clipped.
        learning_rate: the peak.
        gate_scope: the option of that name.
    """

    model: MultiExitForSequenceClassification
    config: TrainingConfig
    num_steps: int
    device: torch.device
    _: KW_ONLY
    groups: Mapping[str, Sequence[Parameter]]
    independent: bool
    learning_rate: float
    gate_scope: str

    def __post_init__(self) -> None:
        options, objective = self.config.optimization, self.config.objective
        self.parameters = [p for parameters in self.groups.values() for p in parameters]
        self.weight = objective.aux_weight
        self.max_angle = objective.max_angle
        self.impl = objective.impl
        self.max_norm = options.max_grad_norm or None
        self.dtype = choose_dtype(self.device, fp16=options.fp16, bf16=options.bf16)
        self.scaler: LossScaler | DeepSpeedLossScaler

    @property
    def loss_scale(self) -> Tensor | float:
        """The factor that both losses carry in their backward passes."""
        return self.scaler.scale

    @abstractmethod
    def forward_context(self) -> AbstractContextManager[Any]:
        """The context in which the model is called and its weights are read."""

    @abstractmethod
    def backward(self, losses: ExitLosses) -> None:
        """Accumulate the gradients of one micro-batch.

        The losses are weighted by the share of their texts among those of the step, of all
        processes.
        """

    @abstractmethod
    def step(self, *, compare: bool = False) -> StepReport:
        """Decide, unscale, clip and update, or skip what is not finite.

        compare: find the exact decision too, where `gate_scope` is not all.
        """

    def check(self, loss_scale: float, skipped: bool) -> None:  # noqa: B027 (DeepSpeed's `step` has raised)
        """Refuse a skipped step that a smaller loss scale cannot mend.

        Args: the values of the step's report, once they are on the host.

        Raises:
            FloatingPointError: the gradient is NaN or infinite.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The state that this process needs to continue; each process has its own."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict` of the same process. Collective."""

    def load_parts(self, states: Sequence[dict[str, Any]]) -> None:
        """Continue from the `state_dict` of each process of a run of more, or fewer. Collective.

        Raises:
            ValueError: this backend cannot, or the states do not hold all that is trained now.
        """
        raise ValueError(
            f"The checkpoint holds the parts of {len(states)} processes, which a run under "
            "DeepSpeed joins. Start it with a launcher, also for one process: torchrun "
            "--nproc_per_node 1."
        )

    @abstractmethod
    def full_state_dict(self) -> dict[str, Tensor]:
        """The model's `state_dict`, whole and in float32, on every CPU. Collective."""

    @abstractmethod
    def close(self) -> None:
        """End training and give the model its weights back, whole, in float32. Collective."""
