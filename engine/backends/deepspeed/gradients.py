"""Two gradients under ZeRO: taking, and putting back, the part of a gradient that a rank owns.

DeepSpeed reduces one gradient a step and keeps the result where only it looks. ACL-Grad needs two:
DeepSpeed is let to reduce each, and what it left is taken. This is what all stages have in common;
`zero_stages` knows where each of them keeps it, in the versions of DeepSpeed named here.
"""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from ...objectives.gate import scope_gradients

SUPPORTED = ("0.19.8", "0.20")


def check_version() -> None:
    """Refuse a DeepSpeed whose insides are not known here.

    Raises:
        ValueError: DeepSpeed is missing, or its version is not in `SUPPORTED`.
    """
    first, beyond = SUPPORTED
    wanted = f"pip install 'deepspeed>={first},<{beyond}'"
    try:
        found = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"deepspeed is not installed: {wanted}") from None
    if not Version(first) <= Version(found) < Version(beyond):
        raise ValueError(
            f"deepspeed {found} is installed. Two gradients under ZeRO need its insides, which are "
            f"known for {first} up to {beyond} (not included): {wanted}"
        )


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a parameter's gradient that this rank holds: [start, start + length), flattened."""

    parameter: Parameter
    start: int
    length: int


@dataclass(frozen=True)
class Kept:
    """What a step is not to change: tensors with their values, masters that AdamW has not met."""

    values: list[tuple[Tensor, Tensor]]
    fresh: list[Tensor]


class ZeroGradients(ABC):
    """Several gradients of one optimizer step, numbered 0, 1, …; each is a list of pieces.

    Args:
        engine: of `deepspeed.initialize`; every call to `engine.step()` is an optimizer step.
        num_kinds: how many gradients there are.
    """

    # Whether every rank holds all of the gradient, so that sums over it are not to be reduced.
    replicated = False
    # Whether the loss that `accumulate` takes carries the loss scale already.
    wants_scaled_loss = False

    def __init__(self, engine: Any, num_kinds: int) -> None:
        self.engine = engine
        self.optimizer = engine.optimizer
        self.num_kinds = num_kinds
        self.trained = [p for p in engine.module.parameters() if p.requires_grad]
        # Whether a gradient reached a parameter in this step, and the hooks that notice it.
        self.reached = [False] * len(self.trained)
        self.handles: list[RemovableHandle] = []
        engine.set_gradient_accumulation_boundary(True)
        self.pieces = self._find_pieces()
        self.reset()

    @abstractmethod
    def accumulate(self, kind: int, loss: Tensor, *, retain_graph: bool) -> None:
        """Add the gradient of a (micro-)batch's loss."""

    def peek(self, loss: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """This rank's gradients of some tensors alone, nothing accumulated; the graph is kept."""
        return scope_gradients(loss, tensors)

    @abstractmethod
    def reduced(self, kind: int) -> list[Tensor]:
        """The mean over the ranks of what was accumulated, one tensor a piece. Collective."""

    @abstractmethod
    def put(self, gradients: Sequence[Tensor], finite: bool) -> None:
        """Leave that gradient, one tensor a piece, for `engine.step()`; or what makes it skip."""

    @abstractmethod
    def set_loss_scale(self, scale: float) -> None:
        """The factor that the gradients carry from now on; `engine.step()` divides it out."""

    @abstractmethod
    def master_of(self, piece: Piece) -> Tensor:
        """The tensor, one of `masters`, that holds the piece."""

    @abstractmethod
    def states(self, piece: Piece) -> list[Tensor]:
        """Master weights and moments of a piece, as views: what a step changes on this rank."""

    @abstractmethod
    def _find_pieces(self) -> list[Piece]: ...

    @abstractmethod
    def _take(self) -> list[Tensor]:
        """The pieces that DeepSpeed has just reduced, which it then forgets."""

    @abstractmethod
    def reset(self) -> None:
        """Forget what was accumulated in this step."""

    @property
    def device(self) -> torch.device:
        """Where the reduced gradients lie."""
        return torch.device(self.engine.device)

    @property
    def base_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that DeepSpeed wraps."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    @abstractmethod
    def masters(self) -> list[Tensor]:
        """The weights that the optimizer updates, as this rank holds them."""

    @abstractmethod
    def publish(self) -> None:
        """Carry the masters, changed from outside, to the model's weights. Collective."""

    @torch.no_grad()
    def start_from(self, weights: Mapping[int, Tensor]) -> None:
        """Set the masters to the float32 weights, by `id` of the parameter, that the model had."""
        for piece in self.pieces:
            span = slice(piece.start, piece.start + piece.length)
            value = weights[id(piece.parameter)].flatten()[span]
            master = self.states(piece)[0].view(-1)
            # Less where a parameter ends within its part.
            master[: value.numel()].copy_(value)

    def keep(self, reached: Sequence[bool]) -> Kept:
        """What `restore` needs so that the next step leaves alone what no gradient reached.

        AdamW would let it decay and drift: with a gradient of zeros, not without a gradient.
        """
        idle = {id(p) for p, seen in zip(self.trained, reached, strict=True) if not seen}
        tensors: list[Tensor] = []
        fresh: list[Tensor] = []
        if not idle:
            return Kept([], [])
        # A master of several parameters counts its steps once for all of them.
        busy = {id(self.master_of(p)) for p in self.pieces if id(p.parameter) not in idle}
        state = self.base_optimizer.state
        for piece in self.pieces:
            if id(piece.parameter) not in idle:
                continue
            master = self.master_of(piece)
            tensors += self.states(piece)
            if id(master) not in busy:
                count = state.get(master, {}).get("step")
                if count is None:
                    fresh.append(master)
                else:
                    tensors.append(count)
        return Kept([(tensor, tensor.clone()) for tensor in tensors], fresh)

    def restore(self, kept: Kept) -> None:
        """Undo what the step did to what `keep` was told of."""
        for tensor, value in kept.values:
            tensor.copy_(value)
        for master in kept.fresh:
            # Nothing is there where the step was skipped.
            for value in self.base_optimizer.state.get(master, {}).values():
                value.zero_()

    def begin_forward(self) -> None:  # noqa: B027 (stage 3 alone has something to do)
        """Before the first call of the model for a (micro-)batch."""

    def release(self) -> None:
        """Let go of the parameters."""
        for handle in self.handles:
            handle.remove()

    def full_state_dict(self, frozen: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """The model's weights, whole, in float32, on the CPU of every rank. Collective.

        frozen: float32 values, by `id`, of parameters that the model holds rounded only.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        trained = {id(p) for p in self.trained}
        gathered: dict[int, Tensor] = {}
        for parameter in self.engine.module.parameters():
            if id(parameter) in frozen:
                gathered[id(parameter)] = frozen[id(parameter)]
                continue
            full = safe_get_full_fp32_param(parameter) if id(parameter) in trained else None
            gathered[id(parameter)] = (
                self._whole(parameter)
                if full is None
                else full.detach().to("cpu", torch.float32, copy=True)
            )
        named = dict(self.engine.module.named_parameters(remove_duplicate=False))
        return {
            name: gathered[id(named[name])] if name in named else value.detach().cpu()
            for name, value in self.engine.module.state_dict(keep_vars=True).items()
        }

    def _whole(self, parameter: Parameter) -> Tensor:
        """A parameter that has no master, in float32 on the CPU."""
        return parameter.detach().to("cpu", torch.float32, copy=True)

    def optimizer_state(self) -> dict[str, Any]:
        """`state_dict` of the optimizer that DeepSpeed wraps."""
        return self.base_optimizer.state_dict()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """The counterpart of `optimizer_state`."""
        self.base_optimizer.load_state_dict(state)
