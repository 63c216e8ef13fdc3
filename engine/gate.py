"""ACL-Grad: drop the auxiliary gradient when it points away from the main one (paper eq. 2, 4)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from ..kernels import gated_combine_, grad_dot_norm
from ..kernels.gradients import angle_degrees, choose, combined_squared_norm, within_angle


@dataclass(frozen=True)
class GateDecision:
    """What the gate saw and did, for G groups of parameters; tensors on the parameters' device.

    weight [G]: the auxiliary weight used: the gate's, 0 where the term was dropped, NaN where a
        gradient was not finite.
    kept [G]: whether the angle was within the gate's.
    angle [G]: degrees between the two gradients (90 where one of them is zero).
    grad_norm []: norm of the combined gradient over all groups, unscaled, before clipping.
    active [G]: whether a gradient reached the group at all; without one the angle says nothing.
    finite []: False: an overflow or NaN; no decision was taken and the step must be skipped.
    """

    weight: Tensor
    kept: Tensor
    angle: Tensor
    grad_norm: Tensor
    active: Tensor
    finite: Tensor


class GradientGate:
    """Two backward passes, one decision: for any PyTorch loop.

        gate = GradientGate(model.parameters(), weight=0.02)
        decision = gate.backward(main_loss, auxiliary_loss)
        optimizer.step()

    After `backward`, each parameter's `.grad` holds (1 - w) g_main + w g_auxiliary, where w is
    `weight` if the angle between the two is at most `max_angle`, else 0 (the full g_main). With
    gradient accumulation call `accumulate` for every micro-batch, then `combine` once: the decision
    belongs to the optimizer step. What `.grad` held before counts as main gradient.

    Args:
        parameters: the trained parameters, over which both gradients are compared. One that a loss
            does not reach contributes zeros.
        weight: lambda, in [0, 1].
        max_angle: degrees, in [0, 180].
        groups: one integer a parameter, 0 .. G-1: a decision for each group. None: one for all.
        independent: whether the groups are models of their own, each clipped by its own norm.
        impl: implementation of `grad_dot_norm` and `gated_combine_`.

    Raises:
        ValueError: no parameter that requires a gradient, a value out of range, or an `impl` that
            cannot run on the parameters' device.
    """

    def __init__(
        self,
        parameters: Iterable[Parameter],
        *,
        weight: float = 0.02,
        max_angle: float = 90.0,
        groups: Sequence[int] | None = None,
        independent: bool = False,
        impl: str = "auto",
    ) -> None:
        self.parameters = list(parameters)
        self.groups = list(groups) if groups is not None else None
        if self.groups is not None and len(self.groups) != len(self.parameters):
            raise ValueError(
                f"groups has {len(self.groups)} entries for {len(self.parameters)} parameters."
            )
        if not self.parameters or not all(p.requires_grad for p in self.parameters):
            raise ValueError(
                "parameters must be trained parameters: pass those with requires_grad=True, at "
                "least one."
            )
        if not 0 <= weight <= 1:
            raise ValueError(f"weight={weight} must lie in [0, 1].")
        if not 0 <= max_angle <= 180:
            raise ValueError(f"max_angle={max_angle} degrees must lie in [0, 180].")
        # Refuses now what would fail at the first step.
        choose(impl, self.parameters[0].device)
        self.weight = weight
        self.max_angle = max_angle
        self.independent = independent
        self.impl = impl
        self._auxiliary: list[Tensor | None] = [None] * len(self.parameters)

    def accumulate(self, main_loss: Tensor, auxiliary_loss: Tensor) -> None:
        """Add both gradients of one (micro-)batch; the losses may share their graph."""
        gradients: Sequence[Tensor | None] = [None] * len(self.parameters)
        if auxiliary_loss.requires_grad:
            gradients = torch.autograd.grad(
                auxiliary_loss, self.parameters, retain_graph=True, allow_unused=True
            )
        for index, gradient in enumerate(gradients):
            held = self._auxiliary[index]
            if gradient is not None:
                # Not in place: autograd may hand the same tensor, or a view, to several parameters.
                self._auxiliary[index] = gradient if held is None else held + gradient
        main_loss.backward()

    def combine(
        self, *, loss_scale: float | Tensor = 1.0, max_norm: float | None = None
    ) -> GateDecision:
        """Decide on what was accumulated and leave the combined gradient in `.grad`.

        Args:
            loss_scale: factor that both losses carried; divided out.
            max_norm: clip the combined gradient, or that of each group where they are independent,
                to this norm; None does not clip.
        """
        for parameter, gradient in zip(self.parameters, self._auxiliary, strict=True):
            if parameter.grad is None and gradient is not None:
                parameter.grad = torch.zeros_like(gradient)
        main = [parameter.grad for parameter in self.parameters]
        stats = grad_dot_norm(main, self._auxiliary, groups=self.groups, impl=self.impl)  # [G, 3]
        used = gated_combine_(
            main,
            self._auxiliary,
            stats,
            weight=self.weight,
            max_angle=self.max_angle,
            scale=1.0 / loss_scale,
            max_norm=max_norm,
            clip_groups=self.independent,
            groups=self.groups,
            impl=self.impl,
        )
        self.reset()
        angle = angle_degrees(stats)
        kept = within_angle(stats, self.max_angle)
        grad_norm = combined_squared_norm(stats, used).sum().sqrt() / loss_scale
        active = (stats[:, 1:] != 0).any(dim=1)
        return GateDecision(used, kept, angle, grad_norm, active, torch.isfinite(stats).all())

    def backward(self, main_loss: Tensor, auxiliary_loss: Tensor) -> GateDecision:
        """`accumulate` and `combine` in one, for a step of one batch."""
        self.accumulate(main_loss, auxiliary_loss)
        return self.combine()

    def reset(self) -> None:
        """Forget the auxiliary gradients accumulated so far."""
        self._auxiliary = [None] * len(self.parameters)
