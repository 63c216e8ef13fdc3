"""Two gradients under ZeRO: taking out, and putting back, the part of a gradient of each rank.

DeepSpeed reduces one gradient per step and keeps the result in private attributes. ACL-Grad needs
two, so each is reduced by DeepSpeed and then taken out. This module holds what all ZeRO stages have
in common; `stages` knows the attributes of each, in the versions of DeepSpeed named here.
"""

import contextlib
import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
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
    """Refuse a version of DeepSpeed whose private attributes are not known here.

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
            f"deepspeed {found} is installed. Two gradients under ZeRO need its internals, which "
            f"are known for {first} up to {beyond} (not included): {wanted}"
        )


@dataclass(frozen=True, eq=False)
class Piece:
    """The part [start, start + length) of a flattened gradient that this rank holds.

    Its weights lie at `offset` in the flattened `masters()[group]`.
    """

    parameter: Parameter
    start: int
    length: int
    group: int
    offset: int = 0


class ZeroGradients(ABC):
    """Several gradients of one optimizer step, numbered 0, 1, …; each is a list of pieces.

    Args:
        engine: of `deepspeed.initialize`; every call to `engine.step()` is an optimizer step.
        num_kinds: number of gradients.
    """

    # Whether every rank holds the whole gradient, so that sums over it need no reduction.
    replicated = False
    # Whether the loss passed to `accumulate` must carry the loss scale already.
    wants_scaled_loss = False

    def __init__(self, engine: Any, num_kinds: int) -> None:
        self.engine = engine
        self.optimizer = engine.optimizer
        self.num_kinds = num_kinds
        self.trained = [p for p in engine.module.parameters() if p.requires_grad]
        self.handles: list[RemovableHandle] = []
        engine.set_gradient_accumulation_boundary(True)
        self.pieces = self._find_pieces()
        self.reset()

    @abstractmethod
    def accumulate(self, kind: int, loss: Tensor, *, retain_graph: bool) -> None:
        """Add the gradient of a (micro-)batch's loss."""

    def peek(self, loss: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Gradients of this rank for some tensors; nothing is accumulated and the graph is kept."""
        return scope_gradients(loss, tensors)

    @abstractmethod
    def reduced(self, kind: int) -> list[Tensor]:
        """The accumulated gradient, averaged over the ranks, one tensor per piece. Collective."""

    @abstractmethod
    def put(self, gradients: Sequence[Tensor], finite: bool) -> None:
        """Hand `engine.step()` a gradient, one tensor per piece; finite=False makes it skip."""

    def set_loss_scale(self, scale: float) -> None:
        """Set the factor that the gradients will carry, which `engine.step()` divides out."""
        self.optimizer.override_loss_scale(scale)

    def states(self, piece: Piece) -> list[Tensor]:
        """Master weights and moments of a piece, as views: all that a step changes on this rank."""
        master = self.masters()[piece.group]
        moments = [
            value
            for value in self.base_optimizer.state.get(master, {}).values()
            if torch.is_tensor(value) and value.shape == master.shape
        ]
        span = slice(piece.offset, piece.offset + piece.length)
        return [tensor.view(-1)[span] for tensor in (master.data, *moments)]

    @abstractmethod
    def _find_pieces(self) -> list[Piece]: ...

    @abstractmethod
    def _take(self) -> list[Tensor]:
        """Take out the pieces that DeepSpeed has just reduced."""

    def reset(self) -> None:
        """Clear the accumulated gradients."""
        self.sums: list[list[Any] | None] = [None] * self.num_kinds
        # Whether a gradient has reached each parameter in this step.
        self.reached = [False] * len(self.trained)

    @property
    def device(self) -> torch.device:
        """The device of the reduced gradients."""
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
        """Copy the masters to the model's weights. Collective."""

    @torch.no_grad()
    def start_from(self, weights: Mapping[int, Tensor]) -> None:
        """Set the masters to float32 weights, given by the `id` of their parameters."""
        for piece in self.pieces:
            span = slice(piece.start, piece.start + piece.length)
            value = weights[id(piece.parameter)].flatten()[span]
            # Shorter if the parameter ends within its part.
            self.states(piece)[0][: value.numel()].copy_(value)

    @contextlib.contextmanager
    def resting(self, reached: Sequence[bool]) -> Iterator[None]:
        """Undo the optimizer step within the block for parameters that no gradient has reached.

        Plain AdamW skips parameters without a gradient. Here their gradient is zero, with which
        they would decay and drift.
        """
        idle = {id(p) for p, seen in zip(self.trained, reached, strict=True) if not seen}
        at_rest = [piece for piece in self.pieces if id(piece.parameter) in idle]
        # A master that holds several parameters counts its steps once for all of them.
        busy = {piece.group for piece in self.pieces if id(piece.parameter) not in idle}
        masters, state = self.masters(), self.base_optimizer.state
        tensors = [tensor for piece in at_rest for tensor in self.states(piece)]
        fresh = []
        for group in {piece.group for piece in at_rest} - busy:
            count = state.get(masters[group], {}).get("step")
            if count is None:
                # AdamW has no state of it yet.
                fresh.append(masters[group])
            else:
                tensors.append(count)
        kept = [(tensor, tensor.clone()) for tensor in tensors]
        yield
        for tensor, value in kept:
            tensor.copy_(value)
        for master in fresh:
            # A skipped step leaves no state.
            for value in state.get(master, {}).values():
                value.zero_()
        if idle:
            # The step has given all ranks the updated weights of idle parameters, which a rank
            # that does not hold their masters would keep.
            self.publish()

    def begin_forward(self) -> None:  # noqa: B027 (stage 3 alone has something to do)
        """Prepare for the first call of the model on a (micro-)batch."""

    def release(self) -> None:
        """Remove the hooks from the parameters."""
        for handle in self.handles:
            handle.remove()

    def full_state_dict(self, frozen: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """The model's weights, whole, in float32, on the CPU of every rank. Collective.

        frozen: float32 values, by `id`, of parameters that the model holds only rounded.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        trained = {id(p) for p in self.trained}
        gathered: dict[int, Tensor] = {}
        for parameter in self.engine.module.parameters():
            if id(parameter) in frozen:
                gathered[id(parameter)] = frozen[id(parameter)]
                continue
            full = safe_get_full_fp32_param(parameter) if id(parameter) in trained else None
            whole = self._whole(parameter) if full is None else full
            gathered[id(parameter)] = whole.detach().to("cpu", torch.float32, copy=True)
        named = dict(self.engine.module.named_parameters(remove_duplicate=False))
        return {
            name: gathered[id(named[name])] if name in named else value.detach().cpu()
            for name, value in self.engine.module.state_dict(keep_vars=True).items()
        }

    def _whole(self, parameter: Parameter) -> Tensor:
        """The whole value of a parameter for which DeepSpeed knows no master."""
        return parameter

    def wrapped_optimizer(self) -> AbstractContextManager[torch.optim.Optimizer]:
        """Context with the optimizer that DeepSpeed wraps, whose state can be read and set."""
        return contextlib.nullcontext(self.base_optimizer)
