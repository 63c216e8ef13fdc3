"""The local backend: one process, one device, plain PyTorch."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..objectives.gate import GradientGate
from ..objectives.gate_cut import ScopedGate
from ..objectives.losses import ExitLosses
from ..runtime.device import autocast
from ..runtime.profiler_marks import CE_BACKWARD, OPTIMIZER, part
from .interface import Backend, StepReport
from .loss_scaling import LossScaler
from .optimizers import ScheduledAdamW


@dataclass(eq=False, repr=False)
class LocalBackend(Backend):
    """Forward context, backward passes and one optimizer step, none of which waits for the device.

    See `Backend`. Without float16, a gradient that is not finite is not skipped: `check` ends the
    run.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.scaler: LossScaler = LossScaler(self.device, enabled=self.dtype == torch.float16)
        self.optimizer = ScheduledAdamW(
            self.parameters,
            self.config,
            self.learning_rate,
            self.num_steps,
            self.device,
            may_skip=self.scaler.enabled,
        )
        self.gate: GradientGate | None = None
        settings: dict[str, Any] = {
            "weight": self.weight, "max_angle": self.max_angle, "impl": self.impl
        }  # fmt: skip
        if self.config.gated and self.gate_scope != "all":
            self.gate = ScopedGate(self.model, self.parameters, self.gate_scope, **settings)
        elif self.config.gated:
            sizes = enumerate(map(len, self.groups.values()))
            group_of = [index for index, size in sizes for _ in range(size)]
            self.gate = GradientGate(
                self.parameters, groups=group_of, independent=self.independent, **settings
            )

    def forward_context(self) -> AbstractContextManager[Any]:
        return autocast(self.device, self.dtype)

    def backward(self, losses: ExitLosses) -> None:
        scale = self.scaler.scale
        if self.gate is not None and losses.auxiliary is not None:
            self.gate.accumulate(scale * losses.main.sum(), scale * losses.auxiliary.sum())
        else:
            with part(CE_BACKWARD):
                (scale * losses.weighted(self.weight)).backward()

    @part(OPTIMIZER)
    def step(self, *, compare: bool = False) -> StepReport:
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
        if "layout" in state:
            raise ValueError(
                "The checkpoint was saved by a run under DeepSpeed: resume with a launcher, also "
                "for one process (torchrun --nproc_per_node 1)."
            )
        self.optimizer.load_state_dict(state)
        self.scaler.load_state_dict(state["scaler"])

    def full_state_dict(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu() for name, value in self.model.state_dict().items()}

    def close(self) -> None:
        """Take the gate's cut out of the model; the weights are the model's own already."""
        if isinstance(self.gate, ScopedGate):
            self.gate.close()
