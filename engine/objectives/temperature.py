"""The temperature of the contrastive loss as a number that is learned."""

import math
from typing import Any

import torch
from torch import Tensor

from ..config.sections import LEARNED_TEMPERATURES, ObjectiveOptions, OptimizationOptions
from ..runtime import collectives


class LearnedTemperature:
    """The temperature tau, learned as log(1 / tau) by an AdamW of its own, without weight decay.

    It is no parameter of the model: the gate does not see it, no norm is clipped with it, and
    DeepSpeed does not shard it. Its gradient is computed with the loss. A step in which the gate
    has dropped the contrastive term of every exit, or that was skipped, leaves it and its moments
    as they are. After each step it is clamped to `LEARNED_TEMPERATURES`.

    Args:
        start: the temperature at first, within these bounds.
        learning_rate: constant over the run; about the relative change of tau in a step.
        betas, epsilon: of AdamW.
    """

    def __init__(
        self,
        start: float,
        learning_rate: float,
        device: torch.device,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
    ) -> None:
        self._log_scale = torch.tensor(-math.log(start), device=device).requires_grad_()
        self._optimizer = torch.optim.AdamW(
            [self._log_scale],
            lr=learning_rate,
            betas=betas,
            eps=epsilon,
            weight_decay=0.0,
            fused=True,
        )
        self._gradient: Tensor | None = None

    @classmethod
    def of(
        cls, objective: ObjectiveOptions, optimization: OptimizationOptions, device: torch.device
    ) -> "LearnedTemperature | None":
        """Make the one that the options ask for; None if they ask for a constant."""
        if objective.objective == "ce" or objective.temperature_learning_rate == 0:
            return None
        return cls(
            objective.temperature,
            objective.temperature_learning_rate,
            device,
            betas=(optimization.adam_beta1, optimization.adam_beta2),
            epsilon=optimization.adam_epsilon,
        )

    @property
    def value(self) -> Tensor:
        """The temperature [], a copy without a graph."""
        return (-self._log_scale.detach()).exp()

    def of_exits(
        self, num_exits: int, num_samples: int, is_global: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Leaves log(1 / tau) [E], one per exit, and the temperatures that the loss takes.

        is_global: whether other processes have numbers of samples of their own.
        """
        leaves = self._log_scale.detach().repeat(num_exits).requires_grad_()
        temperatures = (-leaves).exp()
        if num_exits == 1:
            return leaves, temperatures[0]
        # Beside as many samples, [E] could be one temperature per sample.
        if is_global or num_exits == num_samples:
            temperatures = temperatures[:, None].expand(num_exits, num_samples)
        return leaves, temperatures

    def add_gradient(self, gradient: Tensor) -> None:
        """Add the gradients [E] of the exits' losses for their leaves, of one contrastive batch."""
        self._gradient = gradient if self._gradient is None else self._gradient + gradient

    @torch.no_grad()
    def step(self, weights: Tensor, skipped: Tensor | bool) -> None:
        """Update the temperature, alike on every process. Collective; waits for no device.

        Args:
            weights: those of the contrastive losses [E], or [1] for all exits; 0 where dropped.
            skipped: whether the step was.
        """
        gradient, self._gradient = self._gradient, None
        if gradient is None:
            return
        gradient = collectives.total(gradient)
        weights = weights.to(gradient)
        rests = torch.as_tensor(skipped, device=gradient.device) | (weights == 0).all()
        gradient = (weights * gradient).sum()
        # A fused optimizer takes this flag as from a GradScaler, and then changes nothing.
        flag = (rests | ~gradient.isfinite()).float()
        self._optimizer.found_inf = flag  # type: ignore[attr-defined]
        self._log_scale.grad = gradient.nan_to_num(0.0, 0.0, 0.0)
        self._optimizer.step()
        lowest, highest = LEARNED_TEMPERATURES
        self._log_scale.clamp_(-math.log(highest), -math.log(lowest))

    def state_dict(self) -> dict[str, Any]:
        """The temperature and its moments."""
        return {
            "log_scale": self._log_scale.detach().clone(),
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        with torch.no_grad():
            self._log_scale.copy_(state["log_scale"])
        self._optimizer.load_state_dict(state["optimizer"])
