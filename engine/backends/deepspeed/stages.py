"""Access to the reduced gradients of each ZeRO stage of DeepSpeed. They lie in:

    0     `p.grad`, whole on every rank
    1, 2  `optimizer.averaged_gradients[i]`, the rank's part of parameter group i, with padding
    3     `optimizer.averaged_gradients[i]`, one part per parameter, views of one flat buffer

Stages 0 and 1 accumulate both gradients locally and reduce them once per step; stages 2 and 3,
which never hold a whole gradient, reduce in every backward pass. The private attributes used here
are those of the versions in `gradients.SUPPORTED`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from .gradients import Piece, ZeroGradients


class _LocalSums(ZeroGradients):
    """Stages 0 and 1: whole gradients, summed on each rank and reduced once per step."""

    wants_scaled_loss = True

    def reset(self) -> None:
        self.sums: list[list[Tensor | None]] = [
            [None] * len(self.trained) for _ in range(self.num_kinds)
        ]
        self.reached = [False] * len(self.trained)

    def accumulate(self, kind: int, loss: Tensor, *, retain_graph: bool) -> None:
        gradients = torch.autograd.grad(
            loss, self.trained, retain_graph=retain_graph, allow_unused=True
        )
        sums = self.sums[kind]
        for index, gradient in enumerate(gradients):
            if gradient is None:
                continue
            self.reached[index] = True
            held = sums[index]
            # Not in place: autograd may return the same tensor for several parameters.
            sums[index] = gradient if held is None else held.float() + gradient

    def _place(self, kind: int) -> None:
        """Move a sum to `p.grad`, which DeepSpeed reduces; zeros if there is none."""
        for parameter, total in zip(self.trained, self.sums[kind], strict=True):
            parameter.grad = (
                torch.zeros_like(parameter) if total is None else total.to(parameter.dtype)
            )
        self.sums[kind] = [None] * len(self.trained)


class Stage0(_LocalSums):
    """No ZeRO: DeepSpeed averages `p.grad`."""

    replicated = True

    def _find_pieces(self) -> list[Piece]:
        return [Piece(p, 0, p.numel()) for p in self.trained]

    def reduced(self, kind: int) -> list[Tensor]:
        self._place(kind)
        # A single process has nothing to average.
        if torch.distributed.get_world_size() > 1:
            self.engine.allreduce_gradients()
        return self._take()

    def _take(self) -> list[Tensor]:
        taken = []
        for parameter in self.trained:
            assert parameter.grad is not None
            taken.append(parameter.grad)
            parameter.grad = None
        return taken

    def put(self, gradients: Sequence[Tensor], finite: bool) -> None:
        for parameter, gradient in zip(self.trained, gradients, strict=True):
            parameter.grad = gradient if finite else torch.full_like(gradient, torch.inf)

    def set_loss_scale(self, scale: float) -> None:
        # Without ZeRO, DeepSpeed 0.19 does not scale the loss but divides by this in its step.
        if hasattr(self.optimizer, "loss_scale_config"):
            self.optimizer.loss_scale_config.cur_scale = scale

    def start_from(self, weights: Mapping[int, Tensor]) -> None:
        super().start_from(weights)
        # To make the moments, DeepSpeed's wrapper took a step with gradients of zero.
        self.base_optimizer.state.clear()

    def _whole(self, parameter: Parameter) -> Tensor:
        pairs = {id(p): master for p, master in self._pairs()}
        return pairs.get(id(parameter), parameter).detach().to("cpu", torch.float32, copy=True)

    def _pairs(self) -> list[tuple[Parameter, Tensor]]:
        """Parameters with their float32 masters; in a float32 run a parameter is its own master."""
        if not hasattr(self.optimizer, "fp32_groups"):
            return [(p, p) for p in self.trained]
        return [
            pair
            for halves, masters in zip(
                self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True
            )
            for pair in zip(halves, masters, strict=True)
        ]

    def masters(self) -> list[Tensor]:
        return [master for _, master in self._pairs()]

    def master_of(self, piece: Piece) -> Tensor:
        if not hasattr(self, "_master_of"):
            self._master_of = {id(p): master for p, master in self._pairs()}
        return self._master_of[id(piece.parameter)]

    def states(self, piece: Piece) -> list[Tensor]:
        master = self.master_of(piece)
        return [master.data, *_moments(self.base_optimizer, master), piece.parameter.data]

    def publish(self) -> None:
        for parameter, master in self._pairs():
            parameter.data.copy_(master.data)


class _Partitioned(ZeroGradients):
    """Stages 1 to 3: the wrapped optimizer scales the loss and knows the scale."""

    def set_loss_scale(self, scale: float) -> None:
        self.optimizer.override_loss_scale(scale)

    def _backward(self, loss: Tensor, retain_graph: bool) -> None:
        # `engine.forward`, which is not used here, would have done this.
        self.optimizer.clear_backward_seen_flag()
        self.engine._backward_prologue()
        self.engine.backward(loss, retain_graph=retain_graph, scale_wrt_gas=False)
        self.optimizer.clear_backward_seen_flag()


class _FlatGroups(_Partitioned):
    """The layout of stages 1 and 2: a flat partition for each parameter group of the optimizer."""

    def _find_pieces(self) -> list[Piece]:
        optimizer, pieces = self.optimizer, []
        self._places: list[tuple[int, int]] = []  # group and offset in its partition, per piece
        for group, parameters in enumerate(optimizer.params_in_partition):
            rank = torch.distributed.get_rank(optimizer.real_dp_process_group[group])
            size = int(optimizer.partition_size[group])
            starts = optimizer.grad_start_offset[group][rank]
            offsets = optimizer.grad_partition_insertion_offset[group][rank]
            for parameter in parameters:
                number = optimizer.get_param_id(parameter)
                start, offset = int(starts[number]), int(offsets[number])
                length = min(parameter.numel() - start, size - offset)
                pieces.append(Piece(parameter, start, length))
                self._places.append((group, offset))
        return pieces

    def _take(self) -> list[Tensor]:
        optimizer, taken = self.optimizer, []
        for group, parameters in enumerate(optimizer.params_in_partition):
            held = [
                tensor
                for tensor in optimizer.averaged_gradients[group]
                if not getattr(tensor, "_zero_padding", False)
            ]
            # Tensors beyond the parameters are padding too.
            taken += [tensor.reshape(-1) for tensor in held[: len(parameters)]]
            optimizer.averaged_gradients[group] = None
            optimizer.all_grad_tensors[group] = None
        optimizer.zero_grad(set_to_none=True)
        return taken

    def put(self, gradients: Sequence[Tensor], finite: bool) -> None:
        optimizer = self.optimizer
        device = optimizer.single_partition_of_fp32_groups[0].device
        for group, size in enumerate(optimizer.partition_size):
            flat = torch.zeros(int(size), dtype=torch.float32, device=device)
            for (place, offset), gradient in zip(self._places, gradients, strict=True):
                if place == group:
                    flat[offset : offset + gradient.numel()] = gradient.reshape(-1)
            if not finite:
                flat.fill_(torch.inf)
            optimizer.averaged_gradients[group] = [flat]

    def masters(self) -> list[Tensor]:
        return list(self.optimizer.single_partition_of_fp32_groups)

    def master_of(self, piece: Piece) -> Tensor:
        group, _ = self._places[self.pieces.index(piece)]
        return self.masters()[group]

    def states(self, piece: Piece) -> list[Tensor]:
        _, offset = self._places[self.pieces.index(piece)]
        master = self.master_of(piece)
        span = slice(offset, offset + piece.length)
        views = [t.view(-1)[span] for t in (master.data, *_moments(self.base_optimizer, master))]
        # The weights are gathered from all ranks at the end of the step.
        return [*views, piece.parameter.data]

    def publish(self) -> None:
        self.optimizer.update_lp_params()


class Stage1(_FlatGroups, _LocalSums):
    """Whole local sums, reduced once; each rank keeps its part."""

    def reduced(self, kind: int) -> list[Tensor]:
        self.optimizer.clear_backward_seen_flag()
        with self.engine.coalesce_grad_reduction():
            self._place(kind)
        return self._take()


class _EveryBackward(_Partitioned):
    """Stages 2 and 3: every backward pass is reduced, and the parts are summed."""

    def reset(self) -> None:
        self.sums: list[list[Tensor] | None] = [None] * self.num_kinds
        self.reached = [False] * len(self.trained)
        if not self.handles:
            self.handles = [
                parameter.register_hook(partial(self._note, index))
                for index, parameter in enumerate(self.trained)
            ]

    def _note(self, index: int, gradient: Tensor) -> None:
        self.reached[index] = True

    def accumulate(self, kind: int, loss: Tensor, *, retain_graph: bool) -> None:
        self._backward(loss, retain_graph)
        taken = [tensor.float() for tensor in self._take()]
        held = self.sums[kind]
        if held is None:
            self.sums[kind] = taken
        else:
            torch._foreach_add_(held, taken)

    def reduced(self, kind: int) -> list[Tensor]:
        held = self.sums[kind]
        if held is not None:
            return held
        return [torch.zeros(piece.length, device=self.device) for piece in self.pieces]


class Stage2(_EveryBackward, _FlatGroups):
    """The layout of stage 1, but no rank ever holds a whole gradient."""


class Stage3(_EveryBackward):
    """Weights in parts too: modules gather theirs before each pass and release them after it."""

    def _find_pieces(self) -> list[Piece]:
        pieces = []
        for group in self.optimizer.fp16_groups:
            for parameter in group:
                length = parameter.partition_numel()
                start = self.optimizer._get_param_partition_rank(parameter) * length
                pieces.append(Piece(parameter, start, length))
        return pieces

    def accumulate(self, kind: int, loss: Tensor, *, retain_graph: bool) -> None:
        counts = _backward_counts(self.engine.module) if retain_graph else []
        super().accumulate(kind, loss, retain_graph=retain_graph)
        _restore_backward_counts(counts)

    def peek(self, loss: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor | None]:
        counts = _backward_counts(self.engine.module)
        found = super().peek(loss, tensors)
        _restore_backward_counts(counts)
        return found

    def _backward(self, loss: Tensor, retain_graph: bool) -> None:
        # A parameter that the loss does not reach would keep its previous gradient.
        self.optimizer.grad_partitions_flat_buffer.zero_()
        super()._backward(loss, retain_graph)

    def _take(self) -> list[Tensor]:
        taken = [
            tensor.detach().to(torch.float32, copy=True).reshape(-1)
            for group in range(len(self.optimizer.fp16_groups))
            for tensor in self.optimizer.averaged_gradients[group]
        ]
        self.optimizer.micro_step_id = 0
        return taken

    def put(self, gradients: Sequence[Tensor], finite: bool) -> None:
        given = iter(gradients)
        for number, group in enumerate(self.optimizer.fp16_groups):
            self.optimizer.averaged_gradients[number] = [next(given) for _ in group]
        # The overflow check reads this buffer, not the gradients that were just put.
        self.optimizer.grad_partitions_flat_buffer.fill_(0.0 if finite else torch.inf)

    def begin_forward(self) -> None:
        self.optimizer.parameter_offload.get_param_coordinator().reset_step()

    def _whole(self, parameter: Parameter) -> Tensor:
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().to("cpu", torch.float32, copy=True)

    def masters(self) -> list[Tensor]:
        return list(self.optimizer.fp32_partitioned_groups_flat)

    def master_of(self, piece: Piece) -> Tensor:
        return self.masters()[self._place_of(piece)[0]]

    def states(self, piece: Piece) -> list[Tensor]:
        _, offset = self._place_of(piece)
        master = self.master_of(piece)
        span = slice(offset, offset + piece.length)
        views = [t.view(-1)[span] for t in (master.data, *_moments(self.base_optimizer, master))]
        parameter: Any = piece.parameter
        return [*views, parameter.ds_tensor.data, parameter.data]

    def _place_of(self, piece: Piece) -> tuple[int, int]:
        for number, group in enumerate(self.optimizer.fp16_groups):
            offset = 0
            for parameter in group:
                if parameter is piece.parameter:
                    return number, offset
                offset += parameter.partition_numel()
        raise AssertionError("every piece lies in a group")

    def publish(self) -> None:
        optimizer = self.optimizer
        for number, master in enumerate(optimizer.fp32_partitioned_groups_flat):
            optimizer.fp16_partitioned_groups_flat[number].data.copy_(master.data)
            optimizer._unflatten_partitioned_parameters(number)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    def optimizer_state(self) -> dict[str, Any]:
        # DeepSpeed empties the parameter groups between steps.
        self.optimizer._set_fp32_optimizer_param_groups()
        try:
            return self.base_optimizer.state_dict()
        finally:
            self.optimizer._clear_fp32_optimizer_param_groups()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        self.optimizer._set_fp32_optimizer_param_groups()
        try:
            self.base_optimizer.load_state_dict(state)
        finally:
            self.optimizer._clear_fp32_optimizer_param_groups()


def _moments(optimizer: torch.optim.Optimizer, master: Tensor) -> Iterable[Tensor]:
    state = optimizer.state.get(master, {})
    return [
        value for value in state.values() if torch.is_tensor(value) and value.shape == master.shape
    ]


def _backward_counts(module: Module) -> list[tuple[Module, int | None, int | None]]:
    """The number of times each module will gather and release its weights in backward passes."""
    return [
        (
            child,
            child.__dict__.get("applied_pre_backward_ref_cnt"),
            child.__dict__.get("ds_grads_remaining"),
        )
        for child in module.modules()
    ]


def _restore_backward_counts(counts: list[tuple[Module, int | None, int | None]]) -> None:
    """Let a second pass through the same graph gather the weights again."""
    for child, gathers, releases in counts:
        if gathers is not None:
            child.__dict__["applied_pre_backward_ref_cnt"] = gathers
        if releases is not None:
            child.__dict__["ds_grads_remaining"] = releases
