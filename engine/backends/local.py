"""The local engine: one process, one device, plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import get_linear_schedule_with_warmup

from ..config.training import TrainingConfig
from ..model.multi_exit import MultiExitForSequenceClassification
from ..objectives.gate import GradientGate
from ..objectives.gate_cut import ScopedGate
from ..objectives.losses import ExitLosses
from ..runtime.device import autocast, choose_dtype
from ..runtime.profiler_marks import CE_BACKWARD, OPTIMIZER, part
from .interface import StepReport
from .loss_scaling import LossScaler
from .optimizers import decay_groups, new_optimizer


class LocalEngine:
    """Forward context, two backward passes, one optimizer step.

    Args:
        model: on its device already; parameters without requires_grad are left alone.
        num_steps: optimizer steps of the whole schedule.
        groups: name -> parameters that the angle check takes one decision for; None: all together.
        independent: the groups are models of their own, so each is clipped by its own norm; else
            the norm of all is.
        learning_rate: the peak; None: the configuration's.
        gate_scope: as `parse_scope` reads it; other than all, the model is one with exits.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig,
        num_steps: int,
        device: torch.device,
        *,
        groups: Mapping[str, Sequence[Parameter]] | None = None,
        independent: bool = False,
        learning_rate: float | None = None,
        gate_scope: str = "all",
    ) -> None:
        optimization = config.optimization
        self.model = model
        self.device = device
        self.weight = config.objective.aux_weight
        self.max_norm = optimization.max_grad_norm or None
        self.dtype = choose_dtype(device, fp16=optimization.fp16, bf16=optimization.bf16)
        self.scaler = LossScaler(enabled=self.dtype == torch.float16)
        if groups is None:
            groups = {"model": [p for p in model.parameters() if p.requires_grad]}
        self.groups = {name: list(parameters) for name, parameters in groups.items()}
        self.independent = independent
        self.parameters = [p for parameters in self.groups.values() for p in parameters]
        self.optimizer = new_optimizer(
            optimization.optimizer,
            decay_groups(self.parameters, optimization.weight_decay),
            optimization.learning_rate if learning_rate is None else learning_rate,
            device,
        )
        self.scheduler = get_linear_schedule_with_warmup(
            self.optimizer, round(optimization.warmup_ratio * num_steps), num_steps
        )
        self.gate: GradientGate | ScopedGate | None = None
        if config.gated and gate_scope != "all":
            self.gate = ScopedGate(
                cast(MultiExitForSequenceClassification, model),
                self.parameters,
                gate_scope,
                weight=config.objective.aux_weight,
                max_angle=config.objective.max_angle,
                impl=config.objective.impl,
            )
        elif config.gated:
            self.gate = GradientGate(
                self.parameters,
                weight=config.objective.aux_weight,
                max_angle=config.objective.max_angle,
                groups=[
                    index
                    for index, parameters in enumerate(self.groups.values())
                    for _ in parameters
                ],
                independent=independent,
                impl=config.objective.impl,
            )

    def forward_context(self) -> AbstractContextManager[Any]:
        """Where the model is called."""
        return autocast(self.device, self.dtype)

    @property
    def loss_scale(self) -> float:
        """The factor that both losses carry in their backward passes."""
        return self.scaler.scale

    def backward(self, losses: ExitLosses, share: float = 1.0) -> None:
        """Accumulate the gradients of one micro-batch.

        `share`: a factor of both losses, such as its part of the samples of the optimizer step.
        """
        factor = share * self.scaler.scale
        if self.gate is not None and losses.auxiliary is not None:
            self.gate.accumulate(factor * losses.main.sum(), factor * losses.auxiliary.sum())
        else:
            with part(CE_BACKWARD):
                (factor * losses.weighted(self.weight)).backward()

    @part(OPTIMIZER)
    def step(self, *, compare: bool = False) -> StepReport:
        """Decide, unscale, clip and update; skips the update where a gradient is not finite.

        `compare`: find the exact decision too, where `gate_scope` is not all.
        """
        learning_rate = self.scheduler.get_last_lr()[0]
        scale = self.scaler.scale
        decision = None
        if isinstance(self.gate, ScopedGate):
            decision = self.gate.combine(loss_scale=scale, max_norm=self.max_norm, compare=compare)
        elif self.gate is not None:
            decision = self.gate.combine(loss_scale=scale, max_norm=self.max_norm)
        if decision is not None:
            # No norm without a decision: an overflow above the cut need not reach below it.
            grad_norm = float(decision.grad_norm.where(decision.finite, torch.nan))
        else:
            grad_norm = self._unscale_and_clip(scale)
        finite = math.isfinite(grad_norm)
        if not finite and not self.scaler.enabled:
            raise FloatingPointError(
                "The gradient is NaN or infinite. A lower learning_rate, or max_grad_norm=1, "
                "usually helps."
            )
        if finite:
            self.optimizer.step()
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.update(overflow=not finite)
        return StepReport(grad_norm, learning_rate, scale, not finite, decision)

    def _unscale_and_clip(self, scale: float) -> float:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if scale != 1.0:
            torch._foreach_mul_(gradients, 1.0 / scale)
        limit = self.max_norm if self.max_norm is not None else float("inf")
        clipped = self.groups.values() if self.independent else [self.parameters]
        norms = [nn.utils.clip_grad_norm_(parameters, limit) for parameters in clipped]
        return float(torch.linalg.vector_norm(torch.stack(norms)))

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])

    def full_state_dict(self) -> dict[str, Tensor]:
        """The model's weights, whole and in float32, on the CPU."""
        return {name: value.detach().cpu() for name, value in self.model.state_dict().items()}

    def close(self) -> None:
        """The weights are the model's own; a gate's cut is taken out of it."""
        if isinstance(self.gate, ScopedGate):
            self.gate.close()
