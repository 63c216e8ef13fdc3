"""A step of two gradients under ZeRO: reduce both, decide on all processes alike, update."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ....kernels import gated_combine_, grad_dot_norm
from ....kernels.gradients.angle import combined_squared_norm
from ...objectives.gate import GateDecision, decision_of
from ...runtime import processes
from ...runtime.profiler_marks import (
    CE_BACKWARD,
    COMMUNICATION,
    CONTRASTIVE_BACKWARD,
    GATE,
    OPTIMIZER,
    part,
)
from ..loss_scaling import NOT_FINITE
from .gradients import ZeroGradients

MAIN, AUXILIARY = 0, 1


@dataclass(frozen=True)
class ZeroReport:
    """Result of a step.

    grad_norm []: unscaled, before clipping.
    finite: whether the step was taken.
    decision: None without the gate.
    """

    grad_norm: Tensor
    finite: bool
    decision: GateDecision | None


class ZeroStep:
    """Both gradients of a step and what is done with them, the same on every process.

    Args:
        gradients: of two kinds for the gate, of one without it.
        group_of: the group 0 .. G-1 of each trained parameter, by its `id`.
        weight, max_angle, impl: as for `GradientGate`.
        independent: whether each group is clipped by its own norm, here; otherwise DeepSpeed clips.
        max_norm: that of independent groups; None: they are not clipped.
    """

    def __init__(
        self,
        gradients: ZeroGradients,
        group_of: Mapping[int, int],
        *,
        weight: float,
        max_angle: float,
        impl: str,
        independent: bool = False,
        max_norm: float | None = None,
    ) -> None:
        self.gradients = gradients
        self.gated = gradients.num_kinds > 1
        self.weight = weight if self.gated else 0.0
        self.max_angle = max_angle
        self.impl = impl
        self.independent = independent
        self.max_norm = max_norm
        self.num_groups = max(group_of.values()) + 1
        self._piece_groups = [group_of[id(piece.parameter)] for piece in gradients.pieces]

    def accumulate(self, main: Tensor, auxiliary: Tensor | None, *, factor: float) -> None:
        """Add the gradients of both losses of a (micro-)batch, times a factor."""
        if auxiliary is not None and auxiliary.requires_grad:
            with part(CONTRASTIVE_BACKWARD):
                self.gradients.accumulate(AUXILIARY, factor * auxiliary, retain_graph=True)
        with part(CE_BACKWARD):
            self.gradients.accumulate(MAIN, factor * main, retain_graph=False)

    def step(
        self, *, scale: float, may_overflow: bool, others: Sequence[Tensor] = ()
    ) -> ZeroReport:
        """Decide, combine, and let DeepSpeed unscale, clip and update, or skip. Collective.

        Here the host waits for the device: DeepSpeed's own step reads whether the gradient
        overflowed, and which parameters a gradient reached must be known to keep the others.

        Args:
            scale: the loss scale that the gradients carry.
            may_overflow: whether a step whose gradients are not finite is skipped.
            others: more numbers that must be finite for the step to be taken.

        Raises:
            FloatingPointError: the gradient is NaN or infinite, and no loss scale can mend that.
        """
        gradients = self.gradients
        # `grad_dot_norm` returns as many groups as it is given: the zeros stand for groups of which
        # this process holds no part.
        stand_ins = [torch.zeros(1, device=gradients.device) for _ in range(self.num_groups)]
        groups = [*self._piece_groups, *range(self.num_groups)]
        auxiliary: list[Tensor | None] = [None] * len(groups)
        with part(COMMUNICATION):
            if self.gated:
                auxiliary = [*gradients.reduced(AUXILIARY), *stand_ins]
            main: list[Tensor | None] = [*gradients.reduced(MAIN), *stand_ins]
        # Without the gate this is the norm to clip by.
        with part(GATE if self.gated else OPTIMIZER):
            own_stats = grad_dot_norm(main, auxiliary, groups=groups, impl=self.impl)
        stats, reached, finite = self._totals(own_stats, others)
        if not finite and not may_overflow:
            raise FloatingPointError(NOT_FINITE)
        used = torch.full((self.num_groups,), torch.nan, device=gradients.device)
        if finite:
            limit = self.max_norm * scale if self.independent and self.max_norm else None
            with part(GATE if self.gated else OPTIMIZER):
                used = gated_combine_(
                    main,
                    auxiliary,
                    stats,
                    weight=self.weight,
                    max_angle=self.max_angle,
                    max_norm=limit,
                    clip_groups=self.independent,
                    groups=groups,
                    impl=self.impl,
                )
        grad_norm = combined_squared_norm(stats, used).sum().sqrt() / scale
        decision = None
        if self.gated:
            decision = decision_of(stats, used, self.max_angle, grad_norm)
        self._update(main[: len(gradients.pieces)], reached, finite)
        return ZeroReport(grad_norm, finite, decision)

    def _totals(self, stats: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, list[bool], bool]:
        """The statistics summed over the processes, the parameters reached, and if all is finite.

        The host reads all of it at once, because every read waits for the device.
        """
        device = self.gradients.engine.device
        reached = torch.tensor(self.gradients.reached, dtype=torch.float64, device=device)
        own = stats.double().to(device)
        both = torch.cat([own.flatten(), reached])
        if processes.world_size() > 1:
            torch.distributed.all_reduce(both)
        more = [other.double().flatten() for other in others]
        values = torch.cat([both, *more]).tolist()
        start, stop = own.numel(), both.numel()
        finite = all(map(math.isfinite, [*values[:start], *values[stop:]]))
        sums = own if self.gradients.replicated else both[:start].view_as(own)
        return sums.to(stats), [value > 0 for value in values[start:stop]], finite

    def _update(self, combined: Sequence[Tensor | None], reached: list[bool], finite: bool) -> None:
        gradients, engine = self.gradients, self.gradients.engine
        given = [gradient for gradient in combined if gradient is not None]
        with gradients.resting(reached):
            gradients.put(given, finite)
            # The method of the class, because `ZeroGate` replaces that of the engine.
            type(engine).step(engine)
        if engine.was_step_applied() != finite:
            raise RuntimeError(
                f"deepspeed {'skipped a good' if finite else 'took a bad'} step: this version "
                "decides differently than fusedacl expects. Please report it."
            )
        gradients.reset()
