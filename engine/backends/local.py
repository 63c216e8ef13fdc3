"""The local backend: one process, one device, plain PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ..config.training import TrainingConfig
from ..model.multi_exit import MultiExitForSequenceClassification
from ..objectives.gate import GradientGate
from ..objectives.gate_cut import ScopedGate
from ..objectives.losses import ExitLosses
from ..runtime.device import autocast, choose_dtype
from ..runtime.profiler_marks import CE_BACKWARD, OPTIMIZER, part
from .interface import StepReport
from .loss_scaling import LossScaler
from .optimizers import ScheduledAdamW


class LocalBackend:
    """Forward context, backward passes and one optimizer step, none of which waits for the device.

    Args:
        model: on its device already; parameters without requires_grad are left alone.
        num_steps: optimizer steps of the whole schedule.
        groups: name -> parameters; the angle check decides for each group.
        independent: the groups are models of their own, so each is clipped by its own norm;
            otherwise the norm of all groups together is clipped.
        learning_rate: the peak.
        gate_scope: the option of that name; anything but "all" needs a model with exits.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig,
        num_steps: int,
        device: torch.device,
        *,
        groups: Mapping[str, Sequence[Parameter]],
        independent: bool,
        learning_rate: float,
        gate_scope: str,
    ) -> None:
        options = config.optimization
        self.model = model
        self.device = device
        self.weight = config.objective.aux_weight
        self.max_norm = options.max_grad_norm or None
        self.dtype = choose_dtype(device, fp16=options.fp16, bf16=options.bf16)
        self.scaler = LossScaler(device, enabled=self.dtype == torch.float16)
        self.groups = {name: list(parameters) for name, parameters in groups.items()}
        self.independent = independent
        self.parameters = [p for parameters in self.groups.values() for p in parameters]
        self.optimizer = ScheduledAdamW(
            self.parameters, options, learning_rate, num_steps, device, may_skip=self.scaler.enabled
        )
        self.gate: GradientGate | ScopedGate | None = None
        settings: dict[str, Any] = {
            "weight": config.objective.aux_weight,
            "max_angle": config.objective.max_angle,
            "impl": config.objective.impl,
        }
        if config.gated and gate_scope != "all":
            exits = cast(MultiExitForSequenceClassification, model)
            self.gate = ScopedGate(exits, self.parameters, gate_scope, **settings)
        elif config.gated:
            sizes = enumerate(map(len, self.groups.values()))
            group_of = [index for index, size in sizes for _ in range(size)]
            self.gate = GradientGate(
                self.parameters, groups=group_of, independent=independent, **settings
            )

    def forward_context(self) -> AbstractContextManager[Any]:
        """The context in which the model is called."""
        return autocast(self.device, self.dtype)

    @property
    def loss_scale(self) -> Tensor | float:
        """The factor that both losses carry in their backward passes."""
        return self.scaler.scale

    def backward(self, losses: ExitLosses) -> None:
        """Accumulate the gradients of one micro-batch, whose losses are weighted already."""
        scale = self.scaler.scale
        if self.gate is not None and losses.auxiliary is not None:
            self.gate.accumulate(scale * losses.main.sum(), scale * losses.auxiliary.sum())
        else:
            with part(CE_BACKWARD):
                (scale * losses.weighted(self.weight)).backward()

    @part(OPTIMIZER)
    def step(self, *, compare: bool = False) -> StepReport:
        """Decide, unscale, clip and update; under float16 skip what is not finite.

        Without float16 a gradient that is not finite is not skipped: `check` ends the run.

        compare: find the exact decision too, where `gate_scope` is not all.
        """
        learning_rate, scale = self.optimizer.learning_rate, self.scaler.scale
        decision = None
        if isinstance(self.gate, ScopedGate):
            decision = self.gate.combine(loss_scale=scale, max_norm=self.max_norm, compare=compare)
        elif self.gate is not None:
            decision = self.gate.combine(loss_scale=scale, max_norm=self.max_norm)
        if decision is not None:
            # An overflow above the cut need not reach the norm of what lies below it.
            grad_norm = decision.grad_norm.where(decision.finite, torch.nan)
        else:
            grad_norm = self._unscale_and_clip(scale)
        skipped = ~torch.isfinite(grad_norm)
        self.optimizer.step(skipped if self.scaler.enabled else None)
        self.scaler.update(skipped)
        return StepReport(grad_norm, learning_rate, scale, skipped, decision)

    def check(self, loss_scale: float, skipped: bool) -> None:
        """Refuse a step that a smaller loss scale cannot mend; see `Backend.check`."""
        self.scaler.check(loss_scale, skipped)

    def _unscale_and_clip(self, scale: Tensor | float) -> Tensor:
        """The norm [] of all gradients before clipping."""
        if self.scaler.enabled:
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            torch._foreach_mul_(gradients, 1.0 / scale)
        limit = self.max_norm if self.max_norm is not None else float("inf")
        clipped = self.groups.values() if self.independent else [self.parameters]
        norms = [nn.utils.clip_grad_norm_(parameters, limit) for parameters in clipped]
        return torch.linalg.vector_norm(torch.stack(norms))

    def state_dict(self) -> dict[str, Any]:
        return {**self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)
        self.scaler.load_state_dict(state["scaler"])

    def full_state_dict(self) -> dict[str, Tensor]:
        """The model's weights, whole and in float32, on the CPU."""
        return {name: value.detach().cpu() for name, value in self.model.state_dict().items()}

    def close(self) -> None:
        """Take the gate's cut out of the model; the weights are the model's own already."""
        if isinstance(self.gate, ScopedGate):
            self.gate.close()
