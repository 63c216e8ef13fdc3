"""The gate with a cut: two short backward passes down to it, one decision, one pass from there.

What lies above the cut reads a leaf that stands for what lies below. Each loss gives gradients for
the parameters above and for the leaf; the decision combines both, and the leaf's combined gradient
is what the one backward pass below starts from. Given the decision nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ...kernels import gated_combine_, grad_dot_norm
from ...kernels.gradients.angle import angle_degrees, choose, within_angle
from ..config.gate_scope import parse_scope
from ..model.encoder_layers import layer_modules
from ..model.exits import ExitOutput
from ..model.multi_exit import MultiExitForSequenceClassification
from ..runtime.profiler_marks import CE_BACKWARD, CONTRASTIVE_BACKWARD, GATE, part
from .gate import GateDecision, decision_of, scope_gradients


class Pass(NamedTuple):
    """A forward pass that was cut: the tensor below, the leaf in its place.

    states [N, H]: with `head`, the texts' first hidden states, which the exit has read; constants.
    """

    below: Tensor
    leaf: Tensor
    states: Tensor | None


class Cut:
    """A leaf in place of what the last K encoder layers, or the last exit's classifier, read.

    Every forward pass that builds a graph is cut, until `remove`.

    Raises:
        ValueError: as for `top_layers`.
    """

    def __init__(self, model: MultiExitForSequenceClassification, scope: str) -> None:
        self._below: Tensor | None = None
        self._leaf: Tensor | None = None
        self._states: Tensor | None = None
        num_top = parse_scope(scope)
        if num_top is None:
            raise ValueError("gate_scope=all has no cut: use GradientGate.")
        if num_top:
            cut_layer = top_layers(model, num_top)[0]
            self._handles = [
                cut_layer.register_forward_pre_hook(self._replace_input, with_kwargs=True)
            ]
            return
        exit_: Any = model.exits[-1]
        self._handles = [
            exit_.register_forward_pre_hook(self._note_states),
            exit_.classifier.register_forward_pre_hook(self._replace_input, with_kwargs=True),
            exit_.register_forward_hook(self._replace_embeddings),
        ]

    def take(self) -> Pass:
        """The last forward pass, which is then forgotten.

        Raises:
            RuntimeError: it was not cut, or there was none since.
        """
        if self._below is None or self._leaf is None:
            raise RuntimeError(
                "gate_scope: there was no forward pass with a graph below the cut. Where nothing "
                "below it is trained, use all."
            )
        found = Pass(self._below, self._leaf, self._states)
        self._below = self._leaf = self._states = None
        return found

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()

    def _replace_input(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        below = hidden_states(module, args, kwargs)
        self._below = self._leaf = None
        if not (torch.is_grad_enabled() and below.requires_grad):
            return None
        self._below, self._leaf = below, below.detach().requires_grad_()
        if args:
            return (self._leaf, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._leaf}

    def _note_states(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._states = first_states(args)

    def _replace_embeddings(
        self, module: nn.Module, args: tuple[Any, ...], output: ExitOutput
    ) -> ExitOutput:
        """The contrastive loss is to read the leaf that the classifier has read."""
        return output if self._leaf is None else output._replace(embeddings=self._leaf)


class ScopedGate:
    """`GradientGate` with the angle over a part of the model; one batch an optimizer step.

    Args:
        model: whose last exit both losses read; it is cut until `close`.
        parameters: all trained ones.
        scope: "top:K" or "head", as `parse_scope` reads it.
        weight, max_angle, impl: as for `GradientGate`.

    Raises:
        ValueError: as for `top_layers` and `GradientGate`.
    """

    def __init__(
        self,
        model: MultiExitForSequenceClassification,
        parameters: Iterable[Parameter],
        scope: str,
        *,
        weight: float = 0.02,
        max_angle: float = 90.0,
        impl: str = "auto",
    ) -> None:
        self.parameters = list(parameters)
        choose(impl, self.parameters[0].device)
        self.weight = weight
        self.max_angle = max_angle
        self.impl = impl
        num_top = parse_scope(scope)
        deciding = {id(p) for p in top_parameters(model, num_top)} if num_top else set()
        self._deciding = [id(p) in deciding for p in self.parameters]
        self.cut = Cut(model, scope)
        self._auxiliary: Sequence[Tensor | None] | None = None
        self._pass: Pass | None = None

    def accumulate(self, main_loss: Tensor, auxiliary_loss: Tensor) -> None:
        """Back-propagate both losses of the step's only batch down to the cut.

        Raises:
            RuntimeError: a second batch before `combine`.
        """
        if self._auxiliary is not None:
            raise RuntimeError("A gate with a scope takes one batch a step: call combine() first.")
        self._pass = self.cut.take()
        with part(CONTRASTIVE_BACKWARD):
            self._auxiliary = scope_gradients(auxiliary_loss, [self._pass.leaf, *self.parameters])
        # The pass below may meet parts of this graph: encoders share a bias or a norm of relative
        # positions between layers.
        with part(CE_BACKWARD):
            main_loss.backward(retain_graph=True)

    @part(GATE)
    def combine(
        self,
        *,
        loss_scale: float | Tensor = 1.0,
        max_norm: float | None = None,
        compare: bool = False,
    ) -> GateDecision:
        """Decide, go on below the cut, and leave the combined gradient in `.grad`.

        Args:
            loss_scale, max_norm: as for `GradientGate.combine`.
            compare: find the exact decision too, at the price of two more passes below the cut; the
                gradient is the same with and without.
        """
        assert self._pass is not None and self._auxiliary is not None, "accumulate comes first"
        below, leaf, states = self._pass
        auxiliary = self._auxiliary
        tensors: list[Tensor] = [leaf, *self.parameters]
        for tensor, gradient in zip(tensors, auxiliary, strict=True):
            if tensor.grad is None and gradient is not None:
                tensor.grad = torch.zeros_like(gradient)
        main = [tensor.grad for tensor in tensors]
        stats = grad_dot_norm(
            self._decisive(main, states), self._decisive(auxiliary, states), impl=self.impl
        )
        exact = self._exact_stats(main, auxiliary) if compare else None
        used = gated_combine_(
            main, auxiliary, stats, weight=self.weight, max_angle=self.max_angle, impl=self.impl
        )
        with part(CE_BACKWARD):
            below.backward(leaf.grad)
        self.reset()
        grad_norm = self._scale_and_clip(loss_scale, max_norm)
        decision = decision_of(stats, used, self.max_angle, grad_norm)
        if exact is None:
            return decision
        agrees = within_angle(exact, self.max_angle) == decision.kept
        return replace(decision, exact_angle=angle_degrees(exact), agrees=agrees)

    def _decisive(
        self, gradients: Sequence[Tensor | None], states: Tensor | None
    ) -> list[Tensor | None]:
        """What the angle is over, of a loss's gradients of the leaf and of all parameters."""
        leaf, *rest = gradients
        if states is not None:
            return [None if leaf is None else map_gradient(leaf, states)]
        return [found for found, decides in zip(rest, self._deciding, strict=True) if decides]

    def _exact_stats(
        self, main: Sequence[Tensor | None], auxiliary: Sequence[Tensor | None]
    ) -> Tensor:
        """What `grad_dot_norm` gives for both whole gradients, [1, 3]."""
        whole = [self._whole(gradients) for gradients in (main, auxiliary)]
        return grad_dot_norm(whole[0], whole[1], impl=self.impl)

    def _whole(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """A loss's gradients of all parameters, from those above the cut and the leaf's."""
        cotangent, *above = gradients
        if cotangent is None:
            return above
        assert self._pass is not None
        rest = torch.autograd.grad(
            self._pass.below, self.parameters, cotangent, retain_graph=True, allow_unused=True
        )
        return [
            held if found is None else found if held is None else held + found
            for held, found in zip(above, rest, strict=True)
        ]

    def _scale_and_clip(self, loss_scale: float | Tensor, max_norm: float | None) -> Tensor:
        """Unscale and clip what lies in `.grad`; its norm before clipping."""
        gradients = [parameter.grad for parameter in self.parameters]
        nothing = [None] * len(gradients)
        stats = grad_dot_norm(gradients, nothing, impl=self.impl)
        gated_combine_(
            gradients,
            nothing,
            stats,
            weight=0.0,
            scale=1.0 / loss_scale,
            max_norm=max_norm,
            impl=self.impl,
        )
        return stats[0, 1].sqrt() / loss_scale

    def reset(self) -> None:
        """Forget the batch."""
        self._auxiliary = None
        self._pass = None

    def close(self) -> None:
        """Leave the model as it was."""
        self.reset()
        self.cut.remove()


def map_gradient(gradient: Tensor, states: Tensor) -> Tensor:
    """The gradient [d, H] of a linear map that would add to the representations [N, d].

    Parameters sum over the texts what a loss asks of each; so does this map from the texts' first
    states [N, H]. Text by text, the two gradients at the representations would hardly ever be more
    than 90 degrees apart (measured; see docs/decisions.md).

    gradient [N, d]: of the representations.
    """
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    return gradient.to(dtype).T @ states.to(dtype)


def first_states(args: tuple[Tensor, ...]) -> Tensor:
    """The first token's hidden states [N, H], without their graph, of an exit's arguments."""
    return args[0][:, 0].detach()


def top_layers(model: MultiExitForSequenceClassification, num_top: int) -> list[nn.Module]:
    """Return the encoder's last `num_top` layers, in the order in which they run.

    Raises:
        ValueError: the encoder has fewer layers, or layers that share weights.
    """
    layers = layer_modules(model.backbone)
    number = model.config.backbone_config.num_hidden_layers
    if num_top > number:
        raise ValueError(
            f"gate_scope=top:{num_top}: the encoder has {number} layers. Use top:{number} at most, "
            "or all."
        )
    if not layers:
        raise ValueError(
            f"gate_scope=top:{num_top}: no list of {number} layers is found in "
            f"{type(model.backbone).__name__}. Use all or head."
        )
    return layers[-num_top:]


def top_parameters(model: MultiExitForSequenceClassification, num_top: int) -> list[Parameter]:
    """The trained parameters of the last exit and the last `num_top` encoder layers.

    Raises:
        ValueError: as for `top_layers`.
    """
    # The norm after the last layer, in encoders that normalise before their layers.
    after = getattr(model.backbone, "final_norm", None)
    modules = [*top_layers(model, num_top), model.exits[-1]]
    modules += [] if after is None else [after]
    return [p for module in modules for p in module.parameters() if p.requires_grad]


def hidden_states(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a layer reads, among the arguments of its call.

    Raises:
        ValueError: it is neither the first one nor called hidden_states.
    """
    found = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(found, Tensor):
        raise ValueError(
            f"gate_scope: {type(module).__name__} is not called with hidden states. Use all or "
            "head."
        )
    return found
