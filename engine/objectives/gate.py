"""ACL-Grad: drop the auxiliary gradient if it points away from the main one (paper eq. 2, 4)."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...kernels import gated_combine_, grad_dot_norm
from ...kernels.gradients.angle import angle_degrees, choose, combined_squared_norm, within_angle
from ..runtime.profiler_marks import CE_BACKWARD, CONTRASTIVE_BACKWARD, GATE, part
from .gate_shards import Shards, fsdp_groups, whole_parameters

# The walk over a loss's graph takes about a microsecond per node, too much for every step.
CALLS_PER_CHECK = 100
FSDP1 = (
    "parameters: some lie in a flat parameter of FullyShardedDataParallel (FSDP1), of which a gate "
    "cannot take two gradients. Use torch.distributed.fsdp.fully_shard (FSDP2)."
)
COMPILED = (
    "The model was compiled, in an earlier backward pass, for graphs that are used once. Set "
    "torch._functorch.config.donated_buffer = False before its first forward pass."
)


@dataclass(frozen=True)
class GateDecision:
    """Decisions for G groups of parameters, as tensors on the device of the parameters.

    weight [G]: the auxiliary weight that was used; 0 if the term was dropped, NaN if a gradient was
        not finite.
    kept [G]: whether the angle was within the limit.
    angle [G]: degrees between the two gradients; 90 if one of them is zero.
    grad_norm []: norm of the combined gradient over all groups, unscaled, before clipping.
    active [G]: whether a gradient reached the group at all; otherwise its angle has no meaning.
    finite []: False after an overflow or NaN: the step must be skipped.
    exact_angle, agrees [G]: if the angle is over a part of the model and the exact one was asked
        for, that angle, and whether it leads to the same decision.
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
    """The decision behind stats [G, 3] of `grad_dot_norm` and l' [G] of `gated_combine_`.

    grad_norm []: of the combined gradient; not finite if it overflowed after the decision.
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
    """The weights l' [G] that follow from stats [G, 3], as `gated_combine_` returns them."""
    used = weight * within_angle(stats, max_angle).float()
    return used.masked_fill(~stats.isfinite().all(dim=1), torch.nan)


def check_limits(weight: float, max_angle: float) -> None:
    """Refuse values out of range.

    Raises:
        ValueError: weight is not in [0, 1], or max_angle not in [0, 180].
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight={weight} must lie in [0, 1].")
    if not 0 <= max_angle <= 180:
        raise ValueError(f"max_angle={max_angle} degrees must lie in [0, 180].")


def weighted_sum(main_loss: Tensor, auxiliary_loss: Tensor, used: Tensor) -> Tensor:
    """(1 - l') main + l' auxiliary; main if l' is NaN, after which the step is skipped."""
    weight = used[0].nan_to_num(0.0)
    return (1 - weight) * main_loss + weight * auxiliary_loss


def scope_gradients(loss: Tensor, scope: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Gradients of a loss over some tensors, None where it does not reach; the graph is kept."""
    if not loss.requires_grad:
        return [None] * len(scope)
    with _used_again():
        return torch.autograd.grad(loss, list(scope), retain_graph=True, allow_unused=True)


@contextmanager
def _used_again() -> Iterator[None]:
    """Refuse a model that was compiled for one backward pass."""
    try:
        yield
    except RuntimeError as error:
        if "donated buffer" in str(error):
            raise ValueError(COMPILED) from error
        raise


def graph_nodes(losses: Iterable[Tensor]) -> Iterator[Any]:
    """The autograd nodes that a backward pass from these losses would visit."""
    waiting: list[Any] = [loss.grad_fn for loss in losses if loss.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                waiting.append(below)


def is_reentrant(node: Any) -> bool:
    """True if an autograd node computes activations again in a backward pass of its own.

    The graph above it does not show the parameters, so only a pass that selects none reaches them.
    """
    return bool(node.name() == "CheckpointFunctionBackward")


def main_gradients(
    tensors: Sequence[Tensor], auxiliary: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The `.grad` of some tensors, made of zeros where only the auxiliary loss has a gradient."""
    for tensor, gradient in zip(tensors, auxiliary, strict=True):
        if tensor.grad is None and gradient is not None:
            tensor.grad = torch.zeros_like(gradient)
    return [tensor.grad for tensor in tensors]


@torch.no_grad()
def spoil(gradients: Sequence[Tensor | None], finite: Tensor) -> None:
    """Write a NaN into the gradients unless finite [], so that a GradScaler skips their step."""
    for gradient in gradients:
        if gradient is not None and gradient.numel():
            gradient[(0,) * gradient.dim()].masked_fill_(~finite, torch.nan)
            return


class GradientGate:
    """Two backward passes and one decision, for any PyTorch loop.

        gate = GradientGate(model.parameters(), weight=0.02)
        decision = gate.backward(main_loss, auxiliary_loss)
        optimizer.step()

    After `backward`, the `.grad` of each parameter holds (1 - w) g_main + w g_auxiliary, where w is
    `weight` if the angle between the two gradients is at most `max_angle`, else 0. With gradient
    accumulation call `accumulate` for every micro-batch and then `combine` once, because there is
    one decision per optimizer step. Gradients that `.grad` held before count as main gradients. If
    either gradient is not finite, `.grad` is not, so that a GradScaler skips the step.

    Args:
        parameters: the trained parameters, over which both gradients are compared. One that a loss
            does not reach contributes zeros.
        weight: lambda, in [0, 1].
        max_angle: degrees, in [0, 180].
        groups: the group 0 .. G-1 of each parameter; each group has its own decision. None: one
            decision for all.
        independent: whether the groups are models of their own, each clipped by its own norm.
        process_group: processes that hold the same parameters but other texts: both gradients are
            averaged over them before the decision, which is then the same on all. Run a
            DistributedDataParallel model and the gate under its `no_sync()`: its own averaging
            would mix the two gradients. None: this process alone, or parameters that FSDP2
            (`fully_shard`) has sharded, whose gradients it averages.
        impl: implementation of `grad_dot_norm` and `gated_combine_`.

    Raises:
        ValueError: no parameter requires a gradient, some are sharded and others are not, a value
            is out of range, or `impl` cannot run on the device of the parameters.
    """

    def __init__(
        self,
        parameters: Iterable[Parameter],
        *,
        weight: float = 0.02,
        max_angle: float = 90.0,
        groups: Sequence[int] | None = None,
        independent: bool = False,
        process_group: ProcessGroup | None = None,
        impl: str = "auto",
    ) -> None:
        self.parameters = list(parameters)
        self.groups = list(groups) if groups is not None else None
        if self.groups is not None and len(self.groups) != len(self.parameters):
            raise ValueError(
                f"groups has {len(self.groups)} entries for {len(self.parameters)} parameters."
            )
        self._count_once()
        if not self.parameters or not all(p.requires_grad for p in self.parameters):
            raise ValueError(
                "parameters must be trained parameters: pass those with requires_grad=True, at "
                "least one."
            )
        check_limits(weight, max_angle)
        # Refuses here an implementation that would fail in the first step.
        choose(impl, self.parameters[0].device)
        self.weight = weight
        self.max_angle = max_angle
        self.independent = independent
        self.process_group = process_group
        self.impl = impl
        self._shards = self._find_shards()
        self._auxiliary: list[Tensor | None] = [None] * len(self.parameters)
        self._num_calls = 0
        # True if a backward pass can be told which parameters it is for.
        self._selects = True

    def _find_shards(self) -> Shards | None:
        if any(getattr(parameter, "_is_flat_param", False) for parameter in self.parameters):
            raise ValueError(FSDP1)
        wrapped = [p for p in self.parameters if is_traceable_wrapper_subclass(p)]
        if not wrapped:
            return None
        if not hasattr(wrapped[0], "device_mesh"):
            raise ValueError(
                f"parameters: one is a {type(wrapped[0]).__name__}. The gate takes plain "
                "parameters, and the DTensors of fully_shard."
            )
        if self.process_group is not None:
            raise ValueError(
                "process_group: the parameters are sharded, and fully_shard averages their "
                "gradients. Leave it out."
            )
        return Shards(self.parameters, self.groups)

    def _count_once(self) -> None:
        """Drop repeated parameters, such as tied weights that were listed by both modules."""
        group_of: dict[Parameter, int] = {}
        for index, parameter in enumerate(self.parameters):
            group = 0 if self.groups is None else self.groups[index]
            if group_of.setdefault(parameter, group) != group:
                raise ValueError(
                    f"parameters: entry {index} of shape {tuple(parameter.shape)} is in the groups "
                    f"{group_of[parameter]} and {group}: list it once."
                )
        self.parameters = list(group_of)
        self.groups = None if self.groups is None else list(group_of.values())

    def _check_reached(self, *losses: Tensor) -> None:
        """Refuse losses that train a parameter that the gate does not have, or by other means.

        Such a one would be trained with the main gradient alone, at full weight.
        """
        groups = fsdp_groups()
        sharded = whole_parameters(groups)
        known = set(self.parameters)
        if self._shards is not None:
            self._shards.find(groups)
        elif not known.isdisjoint(sharded):
            raise ValueError(
                "parameters: fully_shard has gathered some for a forward pass. Make the gate "
                "before the first one, or after model.reshard()."
            )
        self._selects = self._shards is None
        for node in graph_nodes(losses):
            replica = getattr(node, "ddp_weakref", None)  # of DistributedDataParallel's own node
            if replica is not None and replica().require_backward_grad_sync:
                raise ValueError(
                    "The losses come from a DistributedDataParallel model, whose own averaging "
                    "would mix the two gradients: run the model and the gate under its no_sync(), "
                    "and give the gate the process_group."
                )
            if is_reentrant(node):
                self._selects = False
            leaf = getattr(node, "variable", None)  # of AccumulateGrad nodes
            if getattr(leaf, "_is_flat_param", False):
                raise ValueError(FSDP1)
            if isinstance(leaf, Parameter) and sharded.get(leaf, leaf) not in known:
                raise ValueError(
                    f"A loss trains a parameter of shape {tuple(leaf.shape)} that the gate does "
                    "not have (was it unfrozen, or the model sharded, later?): make a new "
                    "GradientGate with all trained parameters."
                )

    def accumulate(self, main_loss: Tensor, auxiliary_loss: Tensor) -> None:
        """Add the gradients of both losses of one (micro-)batch; they may share their graph.

        Raises:
            ValueError: a parameter was frozen, or one that the gate does not have was unfrozen; a
                DistributedDataParallel model averages by itself; the model was compiled for one
                backward pass.
        """
        self._check(main_loss, auxiliary_loss)
        if auxiliary_loss.requires_grad:
            # While the auxiliary sum lies in `.grad`, autograd adds to it without a copy.
            self._exchange()
            try:
                gathered = nullcontext() if self._shards is None else self._shards.gathered()
                with part(CONTRASTIVE_BACKWARD), gathered, _used_again():
                    inputs = self.parameters if self._selects else None
                    auxiliary_loss.backward(retain_graph=True, inputs=inputs)
            finally:
                self._exchange()
        with part(CE_BACKWARD):
            main_loss.backward()

    def _check(self, *losses: Tensor) -> None:
        """Refuse parameters that were frozen and, now and then, what `_check_reached` looks for."""
        if self._num_calls % CALLS_PER_CHECK == 0:
            self._check_reached(*losses)
        self._num_calls += 1
        frozen = next((p for p in self.parameters if not p.requires_grad), None)
        if frozen is not None:
            raise ValueError(
                f"A parameter of shape {tuple(frozen.shape)} was frozen later: make a new "
                "GradientGate with the parameters that are trained now."
            )

    def _exchange(self) -> None:
        """Swap `.grad` with the auxiliary gradients accumulated so far."""
        for index, parameter in enumerate(self.parameters):
            parameter.grad, self._auxiliary[index] = self._auxiliary[index], parameter.grad
        if self._shards is not None:
            self._shards.exchange()

    def _average(self, group: ProcessGroup) -> None:
        """Average both gradients over the processes; one reached on any of them is so on all.

        The host waits for the device once, to know which those are.
        """
        lists = [[p.grad for p in self.parameters], self._auxiliary]
        present = [[gradient is not None for gradient in gradients] for gradients in lists]
        reached = torch.tensor(present, dtype=torch.float32, device=self.parameters[0].device)
        torch.distributed.all_reduce(reached, group=group)
        for gradients, counts in zip(lists, reached.tolist(), strict=True):
            used = [index for index, count in enumerate(counts) if count]
            # Not a set, whose order differs between processes.
            for dtype in dict.fromkeys(self.parameters[index].dtype for index in used):
                chosen = [index for index in used if self.parameters[index].dtype == dtype]
                parts = [gradients[index] for index in chosen]
                flat = torch.cat(
                    [
                        self.parameters[index].new_zeros(self.parameters[index].numel())
                        if part is None
                        else part.reshape(-1)
                        for index, part in zip(chosen, parts, strict=True)
                    ]
                )
                torch.distributed.all_reduce(flat, group=group)
                flat /= torch.distributed.get_world_size(group)
                sizes = [self.parameters[index].numel() for index in chosen]
                for index, piece in zip(chosen, flat.split(sizes), strict=True):
                    gradients[index] = piece.view_as(self.parameters[index])
        for parameter, gradient in zip(self.parameters, lists[0], strict=True):
            parameter.grad = gradient

    @part(GATE)
    def combine(
        self, *, loss_scale: float | Tensor = 1.0, max_norm: float | None = None
    ) -> GateDecision:
        """Decide on the accumulated gradients and leave the combined one in `.grad`.

        Args:
            loss_scale: factor that both losses carried; it is divided out.
            max_norm: clip the combined gradient, or that of each group if they are independent, to
                this norm; None: do not clip.

        Raises:
            ValueError: FSDP2 has gradients that it was told not to reduce.
        """
        if self.process_group is not None:
            self._average(self.process_group)
        main, auxiliary = main_gradients(self.parameters, self._auxiliary), self._auxiliary
        if self._shards is None:
            stats = grad_dot_norm(main, auxiliary, groups=self.groups, impl=self.impl)  # [G, 3]
        else:
            if self._shards.waits:
                raise ValueError(
                    "There are gradients that fully_shard has not reduced: call "
                    "model.set_requires_gradient_sync(True) before the last micro-batch of a step."
                )
            main, auxiliary = self._shards.parts(main), self._shards.parts(auxiliary)
            own = grad_dot_norm(main, auxiliary, groups=self._shards.groups, impl=self.impl)
            stats = self._shards.total(own)
        used = gated_combine_(
            main,
            auxiliary,
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
        decision = decision_of(stats, used, self.max_angle, grad_norm)
        spoil(main, decision.finite)
        return decision

    def backward(
        self,
        main_loss: Tensor,
        auxiliary_loss: Tensor,
        *,
        scope: Sequence[Tensor] | None = None,
    ) -> GateDecision:
        """`accumulate` and `combine` in one call, for steps of one batch.

        Args:
            scope: take the angle over these tensors only, such as the parameters of the last
                layers, and back-propagate the weighted sum of the losses once. This is cheaper, and
                sometimes decides differently. None: all parameters.

        Raises:
            ValueError: as `accumulate`; there is a scope beside groups, each of which has an angle
                of its own, beside a process_group, or beside sharded parameters.
        """
        if scope is None:
            self.accumulate(main_loss, auxiliary_loss)
            return self.combine()
        if self.groups is not None:
            raise ValueError("scope: the gate has groups, each with its own angle. Leave one out.")
        if self.process_group is not None or self._shards is not None:
            shared = "sharded parameters" if self._shards else "a process_group"
            raise ValueError(f"scope: with {shared} the angle is of all parameters. Leave it out.")
        self._check(main_loss, auxiliary_loss)
        main, auxiliary = (scope_gradients(loss, scope) for loss in (main_loss, auxiliary_loss))
        stats = grad_dot_norm(main, auxiliary, impl=self.impl)
        used = used_weight(stats, self.weight, self.max_angle)
        weighted_sum(main_loss, auxiliary_loss, used).backward()
        gradients = [parameter.grad for parameter in self.parameters]
        squared = grad_dot_norm(gradients, [None] * len(gradients), impl=self.impl)[0, 1]
        decision = decision_of(stats, used, self.max_angle, squared.sqrt())
        spoil(gradients, decision.finite)
        return decision

    def reset(self) -> None:
        """Forget the auxiliary gradients accumulated so far."""
        self._auxiliary = [None] * len(self.parameters)
        if self._shards is not None:
            self._shards.forget()
