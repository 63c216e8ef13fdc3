"""The decision of a step in transformers' Trainer, and what its log says of it."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..config.gate_scope import parse_scope
from ..config.sections import ObjectiveOptions
from ..objectives.gate import (
    GateDecision,
    decision_of,
    scope_gradients,
    used_weight,
    weighted_sum,
)
from ..objectives.gate_cut import map_gradient, shared_stats
from ..objectives.losses import ExitLosses
from .classifiers import Classifiers


class ScopeDecision:
    """The decision by the angle over a part of the model, before the one backward pass.

    The gradients over the part are averaged over the processes. The caller back-propagates what
    `weigh` returns, in whatever way its loop does.

    Args:
        scope: "top:K" or "head", as `parse_scope` reads it.
        process_group: processes that train together; None: this one alone.

    Raises:
        ValueError: the model has fewer layers than the scope, or trains nothing in or below it.
    """

    def __init__(
        self,
        classifiers: Classifiers,
        scope: str,
        options: ObjectiveOptions,
        process_group: ProcessGroup | None,
    ) -> None:
        self.scope = scope
        self.num_top = parse_scope(scope)
        self.classifiers = classifiers
        self.parameters = (
            classifiers.top_parameters(self.num_top)
            if self.num_top
            else classifiers.parameters_below()
        )
        if not self.parameters:
            raise ValueError(
                f"gate_scope={scope}: the model has nothing to train in or below it. Use "
                "gate_scope=all, or freeze fewer."
            )
        self.options = options
        self.process_group = process_group

    def weigh(self, losses: ExitLosses, loss_scale: Tensor | float) -> tuple[Tensor, GateDecision]:
        """The weighted sum of both losses, NaN after an overflow, and the decision.

        The norm of the decision is not known yet, and NaN.

        Args:
            losses: of the last exit, which has just read its input.
            loss_scale: factor against underflow in float16; the sum does not carry it.

        Raises:
            ValueError: the cross-entropy does not depend on the scope.
        """
        assert losses.auxiliary is not None
        pair = (losses.main.sum(), losses.auxiliary.sum())
        read = self.classifiers.last_input
        assert read is not None
        scope = self.parameters if self.num_top else [read]
        found = [scope_gradients(loss_scale * loss, scope) for loss in pair]
        if all(part is None for part in found[0]):
            # Zeros would have an angle of 90 degrees, and the gate would keep whatever it is given.
            raise ValueError(
                f"gate_scope={self.scope}: the gradient of the cross-entropy does not reach it, as "
                "in a model that is compiled as a whole. Use gate_scope=top:1 or all."
            )
        flats = [self._flat(parts, scope) for parts in found]
        stats = shared_stats(flats, self.process_group, self.options.impl)
        used = used_weight(stats, self.options.aux_weight, self.options.max_angle)
        loss = weighted_sum(*pair, used)
        # An overflow must reach every gradient, so that a scaler skips the step.
        loss = torch.where(used[0].isnan(), used[0] * loss, loss)
        unknown = torch.full_like(stats[0, 0], torch.nan)
        return loss, decision_of(stats, used, self.options.max_angle, unknown)

    def _flat(self, found: Sequence[Tensor | None], scope: Sequence[Tensor]) -> Tensor:
        """The gradient over the scope in float32, zeros where there is none."""
        parts = [
            torch.zeros_like(tensor, dtype=torch.float32) if part is None else part.float()
            for part, tensor in zip(found, scope, strict=True)
        ]
        if not self.num_top:
            # Where the pooling is unknown, the representations stand in for the states.
            states = self.classifiers.text_states
            states = scope[0].detach() if states is None else states
            parts = [map_gradient(parts[0].flatten(0, -2), states.flatten(0, -2))]
        return torch.cat([part.flatten() for part in parts])


class GateLog:
    """Means of the losses, angles and decisions since the last log, kept on the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], weight: Tensor | float = 1.0) -> None:
        """Add values of shape [] with their weight in the mean; with weight 0 they may be NaN."""
        for name, value in values.items():
            value = value.detach().float()
            # Not `torch.tensor`, for whose copy the host would wait.
            count = weight.to(value) if isinstance(weight, Tensor) else value.new_full((), weight)
            value = torch.where(count > 0, value * count, 0.0)
            held = name in self._sums
            self._sums[name] = self._sums[name] + value if held else value
            self._weights[name] = self._weights[name] + count if held else count

    def add_decision(self, groups: Sequence[str], decision: GateDecision) -> None:
        """Add the angle and the decision of each group that a finite gradient reached."""
        counted = decision.active & decision.weight.isfinite()
        for index, name in enumerate(groups):
            suffix = "" if len(groups) == 1 else f"_{name.replace(' ', '_')}"
            values = {
                f"angle_degrees{suffix}": decision.angle[index],
                f"gate_kept{suffix}": decision.kept[index],
            }
            self.add(values, counted[index])

    def take(self, average: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means since the last call, and forget them; values that never counted are left out.

        average: averages a tensor over the processes; a collective call.
        """
        if not self._sums:
            return {}
        names = list(self._sums)
        rows = torch.stack(
            [torch.stack([part[name] for name in names]) for part in (self._sums, self._weights)]
        )
        sums, weights = average(rows).tolist()
        self._sums, self._weights = {}, {}
        return {
            name: total / weight
            for name, total, weight in zip(names, sums, weights, strict=True)
            if weight
        }


def decided_loss(values: Tensor, decision: GateDecision, weight: float) -> Tensor:
    """The loss [] of a step with the weights that the gate has left, summed over the exits.

    Args:
        values: `ExitLosses.values` [3, E] of the step.
        decision: for one group, or for the E exits first.
        weight: lambda; a skipped step is reported with it.
    """
    main, _, auxiliary = values
    kept = decision.kept if len(decision.kept) == 1 else decision.kept[: len(main)]
    used = weight * torch.where(decision.finite, kept.to(main), 1.0)
    return ((1 - used) * main + used * auxiliary).sum()
