"""ACL-Grad: drop the auxiliary gradient when it points away from the main one (paper eq. 2, 4)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from ...kernels import gated_combine_, grad_dot_norm
from ...kernels.gradients.angle import angle_degrees, choose, combined_squared_norm, within_angle
from ..runtime.profiler_marks import CE_BACKWARD, CONTRASTIVE_BACKWARD, GATE, part


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
    exact_angle, agrees [G]: where the angle is over a part of the model and the exact one was asked
        for: that angle, and whether it decides alike.
    """

    weight: Tensor
    kept: Tensor
    angle: Tensor
    grad_norm: Tensor
    active: Tensor
    finite: Tensor
    exact_angle: Tensor | None = None
    agrees: Tensor | None = None


def decision_of(stats: Tensor, used: Tensor, max_angle: float, grad_norm: Tensor) -> GateDecision:
    """What the [G, 3] of `grad_dot_norm` say, and the l' [G] that `gated_combine_` has used.

    grad_norm []: of the combined gradient; not finite where it overflowed after the decision.
    """
    return GateDecision(
        used,
        within_angle(stats, max_angle),
        angle_degrees(stats),
        grad_norm,
        (stats[:, 1:] != 0).any(dim=1),
        torch.isfinite(stats).all() & torch.isfinite(grad_norm),
    )


def used_weight(stats: Tensor, weight: float, max_angle: float) -> Tensor:
    """The l' [G] that stats [G, 3] decide for, as `gated_combine_` returns it."""
    used = weight * within_angle(stats, max_angle).float()
    return used.masked_fill(~stats.isfinite().all(dim=1), torch.nan)


def weighted_sum(main_loss: Tensor, auxiliary_loss: Tensor, used: Tensor) -> Tensor:
    """(1 - l') main + l' auxiliary; without a decision (NaN), where no step follows, main."""
    weight = used[0].nan_to_num(0.0)
    return (1 - weight) * main_loss + weight * auxiliary_loss


def scope_gradients(loss: Tensor, scope: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """A loss's gradients of some tensors, None where it reaches none; its graph is kept."""
    if not loss.requires_grad:
        return [None] * len(scope)
    return torch.autograd.grad(loss, list(scope), retain_graph=True, allow_unused=True)


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
        if auxiliary_loss.requires_grad:
            # In place of the main gradient, autograd adds to the sum so far without a copy of it.
            self._exchange()
            try:
                with part(CONTRASTIVE_BACKWARD):
                    auxiliary_loss.backward(retain_graph=True, inputs=self.parameters)
            finally:
                self._exchange()
        with part(CE_BACKWARD):
            main_loss.backward()

    def _exchange(self) -> None:
        """Swap `.grad` and the auxiliary gradients accumulated so far."""
        for index, parameter in enumerate(self.parameters):
            parameter.grad, self._auxiliary[index] = self._auxiliary[index], parameter.grad

    @part(GATE)
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
        grad_norm = combined_squared_norm(stats, used).sum().sqrt() / loss_scale
        return decision_of(stats, used, self.max_angle, grad_norm)

    def backward(
        self,
        main_loss: Tensor,
        auxiliary_loss: Tensor,
        *,
        scope: Sequence[Tensor] | None = None,
    ) -> GateDecision:
        """`accumulate` and `combine` in one, for a step of one batch.

        Args:
            scope: take the angle over these tensors only, such as the parameters of the last
                layers, and back-propagate the weighted sum of the losses once. Cheaper, and at
                times another decision. None: all parameters.

        Raises:
            ValueError: a scope beside groups, which decide for themselves.
        """
        if scope is None:
            self.accumulate(main_loss, auxiliary_loss)
            return self.combine()
        if self.groups is not None:
            raise ValueError("scope: the gate has groups, each with its own angle. Leave one out.")
        main, auxiliary = (scope_gradients(loss, scope) for loss in (main_loss, auxiliary_loss))
        stats = grad_dot_norm(main, auxiliary, impl=self.impl)
        used = used_weight(stats, self.weight, self.max_angle)
        weighted_sum(main_loss, auxiliary_loss, used).backward()
        gradients = [parameter.grad for parameter in self.parameters]
        squared = grad_dot_norm(gradients, [None] * len(gradients), impl=self.impl)[0, 1]
        return decision_of(stats, used, self.max_angle, squared.sqrt())

    def reset(self) -> None:
        """Forget the auxiliary gradients accumulated so far."""
        self._auxiliary = [None] * len(self.parameters)
