"""The gate with a cut: both losses are back-propagated down to it, and one gradient from there.

Above the cut, the model reads a leaf tensor in place of the tensor below. Each loss gives gradients
for the parameters above the cut and for the leaf. The decision combines them, and the combined
gradient of the leaf is back-propagated through the part below. Given the decision, this is exact.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import Parameter
from transformers import PreTrainedModel

from ...kernels import gated_combine_, grad_dot_norm
from ...kernels.gradients.angle import angle_degrees, within_angle
from ..config.gate_scope import parse_scope
from ..model.encoder_layers import layer_modules
from ..model.exits import Exit, ExitOutput
from ..model.multi_exit import MultiExitForSequenceClassification
from ..runtime.profiler_marks import CE_BACKWARD, CONTRASTIVE_BACKWARD, GATE, part
from .gate import GateDecision, GradientGate, decision_of, main_gradients, scope_gradients


class Pass(NamedTuple):
    """A forward pass that was cut: the tensor below the cut and the leaf in its place.

    states [N, H]: with `head`, the hidden state that the exit reads of each text, as constants.
    """

    below: Tensor
    leaf: Tensor
    states: Tensor | None = None


class HeadInputs:
    """Hooks that note what the last exit and its classifier read, until `remove`.

    states [N, H]: the hidden state that the exit reads of each text (the first, or the mean),
    without its graph.
    representations [N, d]: the input of the classifier.
    """

    def __init__(self, model: MultiExitForSequenceClassification) -> None:
        self.states: Tensor | None = None
        self.representations: Tensor | None = None
        exit_: Any = model.exits[-1]
        # Before the hooks of ZeRO 3, which pass on tensors that the losses do not come from.
        self._handles = [
            exit_.register_forward_pre_hook(self._note_states, prepend=True),
            exit_.classifier.register_forward_pre_hook(self._note_input, prepend=True),
        ]

    def _note_states(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.states = cast(Exit, module).text_states(*args).detach()

    def _note_input(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.representations = args[0]

    def forget(self) -> None:
        self.states = self.representations = None

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class Cut:
    """A leaf in place of the input of the last K encoder layers, or of the last exit's classifier.

    Every forward pass that builds a graph is cut, until `remove`.

    Raises:
        ValueError: as for `top_layers`.
    """

    def __init__(self, model: MultiExitForSequenceClassification, scope: str) -> None:
        self._pass: Pass | None = None
        num_top = parse_scope(scope)
        if num_top is None:
            raise ValueError("gate_scope=all has no cut: use GradientGate.")
        exit_: Any = model.exits[-1]
        module = top_layers(model.backbone, num_top)[0] if num_top else exit_.classifier
        self._handles = [module.register_forward_pre_hook(self._replace_input, with_kwargs=True)]
        self._head = None if num_top else HeadInputs(model)
        if not num_top:
            self._handles.append(exit_.register_forward_hook(self._replace_embeddings))

    def take(self) -> Pass:
        """Return the last forward pass and forget it.

        Raises:
            RuntimeError: there was none since the last call, or it was not cut.
        """
        if self._pass is None:
            raise RuntimeError(
                "gate_scope: there was no forward pass with a graph below the cut. Where nothing "
                "below it is trained, use all."
            )
        found, self._pass = self._pass, None
        if self._head is not None:
            found = found._replace(states=self._head.states)
            self._head.forget()
        return found

    def remove(self) -> None:
        """Restore the model."""
        for hook in (*self._handles, *([self._head] if self._head else [])):
            hook.remove()

    def _replace_input(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        below = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(below, Tensor):
            raise ValueError(
                f"gate_scope: {type(module).__name__} is not called with hidden states. Use all "
                "or head."
            )
        self._pass = None
        if not (torch.is_grad_enabled() and below.requires_grad):
            return None
        leaf = below.detach().requires_grad_()
        self._pass = Pass(below, leaf)
        if args:
            return (leaf, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": leaf}

    def _replace_embeddings(
        self, module: nn.Module, args: tuple[Any, ...], output: ExitOutput
    ) -> ExitOutput:
        """Give the contrastive loss the leaf that the classifier has read."""
        return output if self._pass is None else output._replace(embeddings=self._pass.leaf)


class ScopedGate(GradientGate):
    """`GradientGate` with the angle over a part of the model, for one batch per optimizer step.

    Args:
        model: its last exit is what both losses read; it is cut until `close`.
        parameters: all trained parameters.
        scope: "top:K" or "head", as `parse_scope` reads it.
        settings: weight, max_angle and impl of `GradientGate`.

    Raises:
        ValueError: as for `top_layers` and `GradientGate`.
    """

    def __init__(
        self,
        model: MultiExitForSequenceClassification,
        parameters: Iterable[Parameter],
        scope: str,
        **settings: Any,
    ) -> None:
        super().__init__(parameters, **settings)
        num_top = parse_scope(scope)
        deciding = {id(p) for p in top_parameters(model, num_top)} if num_top else set()
        self._deciding = [id(p) in deciding for p in self.parameters]
        self.cut = Cut(model, scope)
        self._pass: Pass | None = None

    def accumulate(self, main_loss: Tensor, auxiliary_loss: Tensor) -> None:
        """Back-propagate both losses of the only batch of a step down to the cut.

        Raises:
            RuntimeError: it is the second batch since `combine`.
        """
        if self._pass is not None:
            raise RuntimeError("A gate with a scope takes one batch a step: call combine() first.")
        self._pass = self.cut.take()
        with part(CONTRASTIVE_BACKWARD):
            leaf_and_rest = [self._pass.leaf, *self.parameters]
            self._auxiliary = list(scope_gradients(auxiliary_loss, leaf_and_rest))
        # The pass below the cut may meet parts of this graph again: some encoders share a bias or a
        # norm of relative positions between layers.
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
        """Decide, continue below the cut, and leave the combined gradient in `.grad`.

        Args:
            loss_scale, max_norm: as for `GradientGate.combine`.
            compare: find the exact decision too, by two more passes below the cut; this does not
                change the gradient.
        """
        assert self._pass is not None, "accumulate comes first"
        below, leaf, states = self._pass
        auxiliary = self._auxiliary
        main = main_gradients([leaf, *self.parameters], auxiliary)
        stats = grad_dot_norm(
            self._decisive(main, states), self._decisive(auxiliary, states), impl=self.impl
        )
        exact = None
        if compare:
            exact = grad_dot_norm(
                self._whole(below, main), self._whole(below, auxiliary), impl=self.impl
            )
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
        """The gradients that the angle is taken over, out of the leaf's and all parameters'."""
        leaf, *rest = gradients
        if states is not None:
            return [None if leaf is None else map_gradient(leaf, states)]
        return list(compress(rest, self._deciding))

    def _whole(self, below: Tensor, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of a loss for all parameters, from the leaf's and those above the cut."""
        cotangent, *above = gradients
        if cotangent is None:
            return above
        rest = torch.autograd.grad(
            below, self.parameters, cotangent, retain_graph=True, allow_unused=True
        )
        return [
            held if found is None else found if held is None else held + found
            for held, found in zip(above, rest, strict=True)
        ]

    def _scale_and_clip(self, loss_scale: float | Tensor, max_norm: float | None) -> Tensor:
        """Unscale and clip the gradients in `.grad`; returns their norm before clipping."""
        gradients = [parameter.grad for parameter in self.parameters]
        nothing = [None] * len(gradients)
        stats = grad_dot_norm(gradients, nothing, impl=self.impl)
        settings: dict[str, Any] = {"max_norm": max_norm, "impl": self.impl}
        gated_combine_(gradients, nothing, stats, weight=0.0, scale=1.0 / loss_scale, **settings)
        return stats[0, 1].sqrt() / loss_scale

    def reset(self) -> None:
        """Forget the current batch."""
        super().reset()
        self._pass = None

    def close(self) -> None:
        """Restore the model."""
        self.reset()
        self.cut.remove()


def shared_stats(flats: Sequence[Tensor], group: ProcessGroup | None, impl: str) -> Tensor:
    """`grad_dot_norm` [1, 3] of two flat gradients averaged over the processes. Collective."""
    both = torch.stack(list(flats))
    if group is not None:
        torch.distributed.all_reduce(both, group=group)
        both /= torch.distributed.get_world_size(group)
    return grad_dot_norm([both[0]], [both[1]], impl=impl)


def map_gradient(gradient: Tensor, states: Tensor) -> Tensor:
    """Gradient [d, H] of a linear map from states [N, H] that is added to the representations.

    Like the gradient of any parameter, it is a sum over the texts. Text by text, the gradients of
    the two losses at the representations are hardly ever more than 90 degrees apart (measured; see
    docs/decisions.md).

    Args:
        gradient: of the representations [N, d].
        states: the hidden state that the exit reads of each text.
    """
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    return gradient.to(dtype).T @ states.to(dtype)


def top_layers(encoder: PreTrainedModel, num_top: int) -> list[nn.Module]:
    """Return an encoder's last `num_top` layers, in the order in which they run.

    Raises:
        ValueError: the encoder has fewer layers, or layers that share weights.
    """
    layers = layer_modules(encoder)
    number = encoder.config.num_hidden_layers
    if num_top > number:
        raise ValueError(
            f"gate_scope=top:{num_top}: the encoder has {number} layers. Use top:{number} at most, "
            "or all."
        )
    if not layers:
        raise ValueError(
            f"gate_scope=top:{num_top}: no list of {number} layers is found in "
            f"{type(encoder).__name__}. Use all or head."
        )
    return layers[-num_top:]


def top_parameters(model: MultiExitForSequenceClassification, num_top: int) -> list[Parameter]:
    """The trained parameters of the last exit and the last `num_top` encoder layers.

    Raises:
        ValueError: as for `top_layers`.
    """
    # Encoders that normalise before each layer have a norm after the last one.
    after = getattr(model.backbone, "final_norm", None)
    modules = [*top_layers(model.backbone, num_top), model.exits[-1]]
    modules += [] if after is None else [after]
    return [p for module in modules for p in module.parameters() if p.requires_grad]
