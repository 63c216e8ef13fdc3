"""The layers of any encoder, also of one whose layers have no call signature that is known here.

Such an encoder runs as a whole while its layers are steered: those that have run are passed over,
the next one gets the hidden states that were kept, and after the last one that is wanted an
exception ends the pass. Embeddings, masks and relative positions are the encoder's own, computed
again after each exit for the texts that are left.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from ..runtime.device import evaluating
from .active_batch import ActiveBatch
from .encoder import examine, probe_batch
from .encoder_layers import FAMILIES, LINEAR, EncoderLayers, Flops, linear_entries

logger = logging.getLogger("fusedacl")

_ORDERS = ((0, 1, 2), (1, 0, 2), (0, 2, 1))
# The forward functions of layers are exchanged while an encoder is steered.
_STEERING = threading.RLock()


@dataclass(frozen=True)
class _Plan:
    """The facts by which an encoder is steered.

    layers: the module of each layer, in the order of the calls; a module may occur repeatedly.
    steered: False: the states of all layers are computed before the first exit.
    runs_first: layer 1 is never passed over, since it gives something to all layers (T5's position
    bias). num_outputs: length of the tuple that a layer returns, 0 for a tensor. order: the axes of
    the states between layers, (1, 0, 2) for [T, N, H] (XLNet); each order is its own inverse.
    """

    layers: tuple[nn.Module, ...]
    steered: bool = False
    runs_first: bool = False
    num_outputs: int = 0
    order: tuple[int, int, int] = (0, 1, 2)
    depends_on_batch: bool = False


class _Reached(Exception):
    """The last layer that is wanted has run; carries its hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__("the last layer that is wanted has run")
        self.hidden = hidden


_PLANS: weakref.WeakKeyDictionary[PreTrainedModel, _Plan] = weakref.WeakKeyDictionary()


def encoder_layers(encoder: PreTrainedModel) -> EncoderLayers:
    """Return the layers of an encoder (a model without a task's head), whatever its family.

    Raises:
        ValueError: the model is a decoder, or no encoder of texts.
    """
    model_type = encoder.config.model_type
    if getattr(encoder.config, "is_decoder", False):
        raise ValueError(f"This {model_type} model is a decoder (is_decoder=True): use an encoder.")
    family = FAMILIES.get(model_type)
    implementation = encoder.config._attn_implementation
    if family is not None and implementation in family.attention_implementations:
        return family(encoder)
    return GenericLayers(encoder)


class GenericLayers(EncoderLayers):
    """The layers of an encoder of any family.

    The FLOPs count every weight matrix of a layer once per token, and leave out what is computed
    again after an exit.

    Raises:
        ValueError: the model is no encoder of texts.
    """

    def __init__(self, encoder: PreTrainedModel) -> None:
        self.encoder = encoder
        if encoder not in _PLANS:
            _PLANS[encoder] = _planned(encoder)
        self.plan = _PLANS[encoder]
        self.layers = list(self.plan.layers)
        self.depends_on_batch = self.plan.depends_on_batch
        _announce(encoder.config.model_type, self.plan.steered)

    @property
    def num_layers(self) -> int:
        return self.encoder.config.num_hidden_layers

    def embed(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Return an empty tensor [N, T, 0]: the embeddings are part of each pass."""
        return torch.empty(*input_ids.shape, 0, device=input_ids.device)

    def carried(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None
    ) -> dict[str, Tensor]:
        inputs = {"input_ids": input_ids}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        if self.plan.steered:
            return inputs
        states = _states(self.encoder, {**inputs, "attention_mask": attention_mask})
        return {str(layer): state for layer, state in enumerate(states)}

    def advance(self, batch: ActiveBatch, layers: range) -> Tensor:
        if not self.plan.steered:
            return batch.carried[str(layers[-1])]
        inputs = {**batch.carried, "attention_mask": batch.attention_mask}
        hidden = None if layers[0] == 1 else batch.hidden
        return _steer(self.encoder, self.plan, inputs, layers, hidden)

    def flops(self, layer: int) -> Flops:
        return self._flops_of(self.layers[layer - 1]) if self.plan.steered else Flops()

    def embedding_flops(self) -> Flops:
        """Operations before the first exit that no exit saves: all layers, if not steered."""
        if self.plan.steered:
            return Flops()
        whole = self._flops_of(self.encoder)
        return Flops(per_token=whole.per_token, per_pair=whole.per_pair * self.num_layers)

    def _flops_of(self, module: nn.Module) -> Flops:
        entries = linear_entries(module) + sum(
            weight.numel()
            for part in module.modules()
            if not isinstance(part, (nn.Embedding, *LINEAR))
            for weight in part.parameters(recurse=False)
            if weight.dim() > 1
        )
        return Flops(per_token=2 * entries, per_pair=4 * self.encoder.config.hidden_size)


@functools.cache
def _announce(model_type: str, steered: bool) -> None:
    how = (
        "embeddings and masks are computed again after each exit: slower than for the families "
        "that run layer by layer (docs/encoders.md)"
        if steered
        else "its layers cannot be run one by one; all run before the first exit: no time is saved"
    )
    logger.info("Early exit of a %s encoder: %s. The answers are the same.", model_type, how)


def _states(encoder: PreTrainedModel, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The hidden states of layers 0 to L as exits read them, [N, T, H] each."""
    output = encoder(**inputs, output_hidden_states=True, return_dict=True)
    return [*output.hidden_states[:-1], output.last_hidden_state]


def _planned(encoder: PreTrainedModel) -> _Plan:
    """Find the encoder's layers by what they return, and try whether they can be steered."""
    behaviour = examine(encoder)
    if behaviour.problem or not behaviour.has_layer_states:
        problem = behaviour.problem or "it has no states of each layer."
        raise ValueError(f"A {encoder.config.model_type} model cannot be left early: {problem}")
    batch = probe_batch(encoder)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), evaluating(encoder):
        states = _states(encoder, batch)
        for outputs in _calls(encoder, batch):
            if len(outputs) != len(states) - 1:
                continue
            first = outputs[0][1]
            modules = tuple(module for module, _ in outputs)
            num_outputs = 0 if isinstance(first, Tensor) else len(first)
            for runs_first, order in itertools.product((False, True), _ORDERS):
                plan = _Plan(
                    modules, True, runs_first, num_outputs, order, behaviour.depends_on_batch
                )
                if _is_exact(encoder, plan, batch, states):
                    return plan
    return _Plan((), depends_on_batch=behaviour.depends_on_batch)


def _calls(
    encoder: PreTrainedModel, batch: dict[str, Tensor]
) -> Iterator[list[tuple[nn.Module, Any]]]:
    """Modules and outputs of the calls in one pass, for each list of modules, outermost first."""
    lists = [module for module in encoder.modules() if isinstance(module, nn.ModuleList)]
    found: list[list[tuple[nn.Module, Any]]] = [[] for _ in lists]
    with contextlib.ExitStack() as hooks:
        for calls, modules in zip(found, lists, strict=True):
            for module in set(modules):

                def keep(module: nn.Module, _: Any, output: Any, calls: list[Any] = calls) -> None:
                    calls.append((module, output))

                hooks.callback(module.register_forward_hook(keep).remove)
        encoder(**batch, return_dict=True)
    for calls in found:
        if all(isinstance(output, Tensor | tuple) for _, output in calls):
            yield calls


def _is_exact(
    encoder: PreTrainedModel, plan: _Plan, batch: dict[str, Tensor], states: list[Tensor]
) -> bool:
    """True if steering from layer to layer gives the states of an ordinary pass, bit for bit."""
    real = batch["attention_mask"].bool()
    hidden = None
    for layer in range(1, len(states)):
        try:
            hidden = _steer(encoder, plan, batch, range(layer, layer + 1), hidden)
        except Exception:
            # These modules are not the layers: the encoder fails in a way of its own.
            return False
        expected = states[layer]
        if hidden.shape != expected.shape or not torch.equal(hidden[real], expected[real]):
            return False
    return True


def _steer(
    encoder: PreTrainedModel,
    plan: _Plan,
    inputs: dict[str, Tensor],
    layers: range,
    hidden: Tensor | None,
) -> Tensor:
    """Run some layers on what the layer before them returned, `hidden` [N, T, H]."""
    length = inputs["input_ids"].shape[1]
    thread = threading.get_ident()
    num_calls = 0
    rest: tuple[Any, ...] = (None,) * (plan.num_outputs - 1)

    def call(forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
        nonlocal num_calls, rest
        if threading.get_ident() != thread:
            return forward(*args, **options)
        num_calls += 1
        given = args[0] if args else options["hidden_states"]
        if num_calls < layers[0]:
            if not (plan.runs_first and num_calls == 1):
                return (given, *rest) if plan.num_outputs else given
        elif num_calls == layers[0] and hidden is not None:
            # Longformer pads to a multiple of its window.
            padding = given.permute(plan.order).shape[1] - length
            given = functional.pad(hidden, (0, 0, 0, padding)).permute(plan.order)
        if args:
            args = (given, *args[1:])
        else:
            options["hidden_states"] = given
        output = forward(*args, **options)
        if num_calls == 1 and plan.runs_first:
            rest = output[1:]
        if num_calls == layers[-1] < len(plan.layers):
            raise _Reached(_hidden(output))
        return output

    with _STEERING, contextlib.ExitStack() as restored:
        for layer in set(plan.layers):
            own = vars(layer).get("forward")
            restored.callback(_restore, layer, own)
            layer.forward = functools.partial(call, layer.forward)
        try:
            reached = encoder(**inputs, return_dict=True).last_hidden_state
        except _Reached as end:
            reached = end.hidden.permute(plan.order)
    return reached[:, :length]


def _restore(layer: nn.Module, own: Any) -> None:
    if own is None:
        del layer.forward
    else:
        layer.forward = own


def _hidden(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
