"""Optimizer offload: masters, moments and reduced gradients in host memory, under ZeRO 1 to 3.

DeepSpeed then keeps a reduced gradient in the `.grad` of the masters until the next one comes. It
notes norms and overflow while it copies to the host, so both must be set when gradients are put
back. Also chooses the class for a stage.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .gradients import ZeroGradients
from .stages import Stage0, Stage1, Stage2, Stage3


class _OnHost(ZeroGradients):
    """Gradients in the `.grad` of the masters, at the offsets of the pieces in their masters."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def _spans(self) -> list[Tensor]:
        """Views of the pieces of a gradient; DeepSpeed makes them once for the whole run."""
        gradients = [cast(Tensor, master.grad).view(-1) for master in self.masters()]
        return [gradients[p.group][p.offset : p.offset + p.length] for p in self.pieces]

    def _forget(self) -> None:
        """Clear the gradients, since a parameter that a loss does not reach would keep its last."""
        for master in self.masters():
            cast(Tensor, master.grad).zero_()

    def _take(self) -> list[Tensor]:
        # The copies to the host may still be under way.
        getattr(self.optimizer, "_wait_for_offload_copies", lambda: None)()
        return [span.clone() for span in self._spans()]

    def put(self, gradients: Sequence[Tensor], finite: bool) -> None:
        optimizer = self.optimizer
        self._forget()
        for piece, span, gradient in zip(self.pieces, self._spans(), gradients, strict=True):
            span.copy_(gradient.reshape(-1))
            number = optimizer.get_param_id(piece.parameter)
            optimizer.norm_for_param_grads[number] = torch.linalg.vector_norm(span)
        self._note_overflow(finite)

    def _note_overflow(self, finite: bool) -> None:
        self.optimizer.local_overflow = not finite


class _FlatOnHost(_OnHost):
    def _begin(self) -> None:
        self._forget()
        # Makes this the first backward pass of a step: earlier gradients have been taken out.
        self.optimizer.micro_step_id = -1
        self.optimizer.norm_for_param_grads = {}


class OffloadedStage1(_FlatOnHost, Stage1):
    """Stage 1 with its optimizer in host memory."""

    def reduced(self, kind: int) -> list[Tensor]:
        self._begin()
        return super().reduced(kind)


class OffloadedStage2(_FlatOnHost, Stage2):
    """Stage 2 with its optimizer in host memory."""

    def _backward(self, loss: Tensor, retain_graph: bool) -> None:
        self._begin()
        super()._backward(loss, retain_graph)


class OffloadedStage3(_OnHost, Stage3):
    """Stage 3 with its optimizer in host memory."""

    def _backward(self, loss: Tensor, retain_graph: bool) -> None:
        self._forget()
        super()._backward(loss, retain_graph)

    _note_overflow = Stage3._note_overflow


def zero_gradients(engine: Any, num_kinds: int, *, offloads: bool) -> ZeroGradients:
    """Access to the gradients of a DeepSpeed engine, by its ZeRO stage.

    offloads: whether its optimizer lies in host memory.
    """
    stages: Sequence[type[ZeroGradients]] = [Stage0, Stage1, Stage2, Stage3]
    if offloads:
        stages = [Stage0, OffloadedStage1, OffloadedStage2, OffloadedStage3]
    return stages[int(engine.zero_optimization_stage())](engine, num_kinds)
