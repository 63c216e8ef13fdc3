"""A model with early exit, cut into segments: what is computed from one exit to the next.

A segment holds the layers up to an exit, the exit, and the policy's rule, traced from the code that
decides in PyTorch. So there is no second implementation of a policy, and every policy has a graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ...model.active_batch import LayerContext
from ...model.early_exit import EarlyExit, certainty_of
from ...model.encoder import fitting_token_types
from ...model.encoder_layers import FAMILIES, EncoderLayers, additive
from ...model.exit_policies import ExitReading, FixedLayer, Memory
from ...model.exits import Exit
from ...model.generic_layers import GenericLayers
from .onnx_early_exit import NEXT


@dataclass(frozen=True)
class Ports:
    """Names of a segment's inputs and outputs, in their order.

    Inputs: input_ids or hidden_states, attention_mask, token_type_ids at the first segment, then
    the policy's memory. Outputs: logits; except at the last segment, also `leaves` (bool [N], the
    texts that leave there) and the hidden_states and memory of the next segment, each name with the
    prefix `NEXT`.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Segment(nn.Module):
    """The encoder's `run` layers up to an exit, that exit, and its decision on each text."""

    def __init__(
        self, engine: EarlyExit, layers: range, head: Exit, memory: tuple[str, ...], is_last: bool
    ) -> None:
        super().__init__()
        # Registered, so that the exporter finds the weights; a graph keeps those that it uses.
        self.backbone = engine.model.backbone
        self.head = head
        self.learned_exit = engine.learned_exit
        self.encoder_layers: EncoderLayers = engine.layers
        self.policy = engine.policy
        self.layers, self.is_last = layers, is_last
        self.memory = memory
        self.is_first = layers[0] == 1
        first = ("input_ids",) if self.is_first else ("hidden_states",)
        types = self.is_first and takes_token_types(engine)
        inputs = (*first, "attention_mask", *(("token_type_ids",) if types else ()), *memory)
        self.ports = Ports(inputs, ("logits",))

    @property
    def layer(self) -> int:
        """The layer of the exit."""
        return self.layers[-1]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the segment on tensors in the order of `ports.inputs`; outputs as in `ports`."""
        return tuple(self.compute(dict(zip(self.ports.inputs, inputs, strict=True))).values())

    def compute(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name, for inputs by name."""
        hidden, embeddings, logits = self.read(named)
        if self.is_last:
            return {"logits": logits}
        memory: Memory = named
        leaves, memory = self.policy.leaves(self.reading(embeddings, logits), memory)
        kept = {"hidden_states": hidden, **memory}
        return {"logits": logits, "leaves": leaves, **{NEXT + name: kept[name] for name in kept}}

    def read(self, named: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [N, T, H], representations [N, d] and logits [N, K] at the exit.

        named: the inputs by name, of which the policy's memory is left.
        """
        mask = named.pop("attention_mask")
        layers = self.encoder_layers
        if self.is_first:
            types = named.pop("token_type_ids", None)
            hidden = layers.embed(named.pop("input_ids"), mask, types)
        else:
            hidden = named.pop("hidden_states")
        context = layers.context(hidden, mask, padded=True)
        if layers.implementation == "sdpa":
            context = _with_finite_masks(context, hidden.dtype)
        for layer in self.layers:
            hidden = layers.run(layer, hidden, context)
        embeddings, logits = self.head(hidden, mask)
        return hidden, embeddings, logits

    def reading(self, embeddings: Tensor, logits: Tensor) -> ExitReading:
        """The exit's outputs as the policy reads them."""
        learned = self.learned_exit
        certainty = None if learned is None else certainty_of(learned, embeddings)
        return ExitReading(self.layer, logits, certainty)


def _with_finite_masks(context: LayerContext, dtype: torch.dtype) -> LayerContext:
    """The context with masks that are added to attention scores, in place of boolean ones.

    For a boolean mask the exporter guards against rows that are masked as a whole, by two more
    passes over the attention weights. There is no such row: every text has a token.
    """
    found = {}
    for name, value in context.items():
        if isinstance(value, dict):
            value = _with_finite_masks(value, dtype)
        elif isinstance(value, Tensor) and value.dtype == torch.bool:
            value = additive(value, dtype)
        found[name] = value
    return found


def takes_token_types(engine: EarlyExit) -> bool:
    """True if the encoder tells several token types apart."""
    types = torch.zeros(1, 1, dtype=torch.int64)
    return fitting_token_types(engine.model.backbone, types) is not None


def split(engine: EarlyExit) -> list[Segment]:
    """The segments of a model with a policy.

    Raises:
        ValueError: the encoder's layers cannot be called one by one.
    """
    if isinstance(engine.layers, GenericLayers):
        config = engine.model.backbone.config
        raise ValueError(
            f"A {config.model_type} encoder (attention: {config._attn_implementation}) cannot be "
            "split into segments, because its layers are not called one by one. That is done for "
            f"{', '.join(FAMILIES)}. Export the whole model (docs/python.md)."
        )
    stages = engine.stages
    if isinstance(engine.policy, FixedLayer):
        # Every text leaves at the first exit that is read.
        stages = stages[:1]
    segments: list[Segment] = []
    memory: tuple[str, ...] = ()
    with torch.no_grad():
        state = example_inputs(engine)
        for number, stage in enumerate(stages, start=1):
            is_last = number == len(stages)
            segment = Segment(engine, stage.layers, stage.head, memory, is_last).eval()
            outputs = segment.compute(dict(zip(segment.ports.inputs, state, strict=True)))
            # A policy says what it remembers when it decides.
            segment.ports = Ports(segment.ports.inputs, tuple(outputs))
            segments.append(segment)
            state = follow(state, tuple(outputs.values()))
            memory = tuple(name.removeprefix(NEXT) for name in tuple(outputs)[3:])
    return segments


def example_inputs(engine: EarlyExit, num_texts: int = 2, length: int = 7) -> tuple[Tensor, ...]:
    """Inputs of the first segment: right-padded random texts of different lengths."""
    vocabulary = cast(nn.Embedding, engine.model.backbone.get_input_embeddings()).num_embeddings
    draw = torch.Generator().manual_seed(length)
    ids = torch.randint(vocabulary, (num_texts, length), generator=draw)
    lengths = torch.linspace(length, max(1, length // 2), num_texts).long()
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = torch.where(mask.bool(), ids, engine.model.backbone.config.pad_token_id or 0)
    types = (torch.zeros_like(ids),) if takes_token_types(engine) else ()
    return (ids, mask, *types)


def follow(inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Inputs of the next segment if no text leaves, from a segment's inputs and outputs."""
    hidden_and_memory = outputs[2:]
    return (*hidden_and_memory[:1], inputs[1], *hidden_and_memory[1:])
