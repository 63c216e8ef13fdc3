"""Access to the reduced gradients of each ZeRO stage of DeepSpeed. They lie in:

    0     `p.grad`, whole on every rank
    1, 2  `optimizer.averaged_gradients[i]`, the rank's part of parameter group i, with padding
    3     `optimizer.averaged_gradients[i]`, one part per parameter, views of one flat buffer

Stages 0 and 1 accumulate both gradients locally and reduce them once per step; stages 2 and 3,
which never hold a whole gradient, reduce in every backward pass. The private attributes used here
are those of the versions in `gradients.SUPPORTED`.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from .gradients import Piece, ZeroGradients


class _LocalSums(ZeroGradients):
    """Stages 0 and 1: whole gradients, summed on each rank and reduced once per step."""

    wants_scaled_loss = True

    def accumulate(self, kind: int, loss: Tensor, *, retain_graph: bool) -> None:
        gradients = torch.autograd.grad(
            loss, self.trained, retain_graph=retain_graph, allow_unused=True
        )
        sums = self.sums[kind] or [None] * len(self.trained)
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                self.reached[index] = True
                held = sums[index]
                # Not in place: autograd may return the same tensor for several parameters.
                sums[index] = gradient if held is None else held.float() + gradient
        self.sums[kind] = sums

    def _place(self, kind: int) -> None:
        """Move a sum to `p.grad`, which DeepSpeed reduces; zeros if there is none."""
        sums = self.sums[kind] or [None] * len(self.trained)
        placed: set[int] = set()
        for p, total in zip(self.trained, sums, strict=True):
            gradient = torch.zeros_like(p) if total is None else total.to(p.dtype).contiguous()
            # The parameters of a sum get one tensor from autograd; they are averaged in place.
            if gradient.data_ptr() in placed:
                gradient = gradient.clone()
            placed.add(gradient.data_ptr())
            p.grad = gradient
        self.sums[kind] = None


class Stage0(_LocalSums):
    """No ZeRO: DeepSpeed averages `p.grad`."""

    replicated = True

    def _find_pieces(self) -> list[Piece]:
        groups = {id(p): group for group, (p, _) in enumerate(self._pairs())}
        return [Piece(p, 0, p.numel(), groups[id(p)]) for p in self.trained]

    def reduced(self, kind: int) -> list[Tensor]:
        self._place(kind)
        # A single process has nothing to average.
        if torch.distributed.get_world_size() > 1:
            self.engine.allreduce_gradients()
        return self._take()

    def _take(self) -> list[Tensor]:
        taken = [parameter.grad for parameter in self.trained]
        for parameter in self.trained:
            parameter.grad = None
        return cast(list[Tensor], taken)

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
        return next((master for p, master in self._pairs() if p is parameter), parameter)

    def _pairs(self) -> list[tuple[Parameter, Tensor]]:
        """Parameters with their float32 masters; in a float32 run a parameter is its own master."""
        if not hasattr(self.optimizer, "fp32_groups"):
            return [(p, p) for p in self.trained]
        halves = chain.from_iterable(self.optimizer.fp16_groups)
        return list(zip(halves, chain.from_iterable(self.optimizer.fp32_groups), strict=True))

    def masters(self) -> list[Tensor]:
        return [master for _, master in self._pairs()]

    def publish(self) -> None:
        for parameter, master in self._pairs():
            parameter.data.copy_(master.data)


class _FlatGroups(ZeroGradients):
    """The layout of stages 1 and 2: a flat partition for each parameter group of the optimizer."""

    def _find_pieces(self) -> list[Piece]:
        optimizer, pieces = self.optimizer, []
        for group, parameters in enumerate(optimizer.params_in_partition):
            rank = torch.distributed.get_rank(optimizer.real_dp_process_group[group])
            size = int(optimizer.partition_size[group])
            starts = optimizer.grad_start_offset[group][rank]
            offsets = optimizer.grad_partition_insertion_offset[group][rank]
            for parameter in parameters:
                number = optimizer.get_param_id(parameter)
                start, offset = int(starts[number]), int(offsets[number])
                length = min(parameter.numel() - start, size - offset)
                pieces.append(Piece(parameter, start, length, group, offset))
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
            for piece, gradient in zip(self.pieces, gradients, strict=True):
                if piece.group == group:
                    flat[piece.offset : piece.offset + piece.length] = gradient.reshape(-1)
            if not finite:
                flat.fill_(torch.inf)
            optimizer.averaged_gradients[group] = [flat]

    def masters(self) -> list[Tensor]:
        return list(self.optimizer.single_partition_of_fp32_groups)

    def publish(self) -> None:
        self.optimizer.update_lp_params()


class Stage1(_FlatGroups, _LocalSums):
    """Whole local sums, reduced once; each rank keeps its part."""

    def reduced(self, kind: int) -> list[Tensor]:
        self.optimizer.clear_backward_seen_flag()
        with self.engine.coalesce_grad_reduction():
            self._place(kind)
        return self._take()


class _EveryBackward(ZeroGradients):
    """Stages 2 and 3: every backward pass is reduced, and the parts are summed."""

    def __init__(self, engine: Any, num_kinds: int) -> None:
        super().__init__(engine, num_kinds)
        for index, parameter in enumerate(self.trained):
            self.handles.append(parameter.register_hook(partial(self._note, index)))

    def _note(self, index: int, gradient: Tensor) -> None:
        self.reached[index] = True

    def _backward(self, loss: Tensor, retain_graph: bool) -> None:
        # `engine.forward`, which is not used here, would have done this.
        self.optimizer.clear_backward_seen_flag()
        self.engine._backward_prologue()
        # The method of the class, because `ZeroGate` replaces that of the engine.
        backward = type(self.engine).backward
        backward(self.engine, loss, retain_graph=retain_graph, scale_wrt_gas=False)
        self.optimizer.clear_backward_seen_flag()

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
        for group, parameters in enumerate(self.optimizer.fp16_groups):
            offset = 0
            for parameter in parameters:
                length = parameter.partition_numel()
                start = self.optimizer._get_param_partition_rank(parameter) * length
                pieces.append(Piece(parameter, start, length, group, offset))
                offset += length
        return pieces

    def accumulate(self, kind: int, loss: Tensor, *, retain_graph: bool) -> None:
        module = self.engine.module
        with _same_backward_counts(module) if retain_graph else contextlib.nullcontext():
            super().accumulate(kind, loss, retain_graph=retain_graph)

    def peek(self, loss: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor | None]:
        with _same_backward_counts(self.engine.module):
            return super().peek(loss, tensors)

    def _backward(self, loss: Tensor, retain_graph: bool) -> None:
        # A parameter that the loss does not reach would keep its previous gradient.
        self.optimizer.grad_partitions_flat_buffer.zero_()
        super()._backward(loss, retain_graph)
        self.optimizer.micro_step_id = 0

    def _take(self) -> list[Tensor]:
        return [
            tensor.detach().to(torch.float32, copy=True).reshape(-1)
            for group in range(len(self.optimizer.fp16_groups))
            for tensor in self.optimizer.averaged_gradients[group]
        ]

    def put(self, gradients: Sequence[Tensor], finite: bool) -> None:
        given = iter(gradients)
        for number, group in enumerate(self.optimizer.fp16_groups):
            self.optimizer.averaged_gradients[number] = [next(given) for _ in group]
        self._note_overflow(finite)

    def _note_overflow(self, finite: bool) -> None:
        # The overflow check reads this buffer, not the gradients that were just put.
        self.optimizer.grad_partitions_flat_buffer.fill_(0.0 if finite else torch.inf)

    def begin_forward(self) -> None:
        self.optimizer.parameter_offload.get_param_coordinator().reset_step()

    def _whole(self, parameter: Parameter) -> Tensor:
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def masters(self) -> list[Tensor]:
        return list(self.optimizer.fp32_partitioned_groups_flat)

    def publish(self) -> None:
        optimizer = self.optimizer
        for number, master in enumerate(optimizer.fp32_partitioned_groups_flat):
            optimizer.fp16_partitioned_groups_flat[number].data.copy_(master.data)
            optimizer._unflatten_partitioned_parameters(number)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    @contextlib.contextmanager
    def wrapped_optimizer(self) -> Iterator[torch.optim.Optimizer]:
        # DeepSpeed empties the parameter groups between steps.
        self.optimizer._set_fp32_optimizer_param_groups()
        try:
            yield self.base_optimizer
        finally:
            self.optimizer._clear_fp32_optimizer_param_groups()


@contextlib.contextmanager
def _same_backward_counts(module: Module) -> Iterator[None]:
    """Let a later pass through the graph of this block gather and release the weights again."""
    names = ("applied_pre_backward_ref_cnt", "ds_grads_remaining")
    found = [
        (vars(child), {name: vars(child).get(name) for name in names}) for child in module.modules()
    ]
    yield
    for attributes, counts in found:
        attributes |= {name: count for name, count in counts.items() if count is not None}
