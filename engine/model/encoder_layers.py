"""An encoder of transformers, run one layer at a time.

Call signatures and masks of the layers differ between families and between versions of
transformers; this file hides the difference. The layers and their attention are the encoder's own.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import PreTrainedModel

from .active_batch import ActiveBatch, LayerContext

# DeBERTa applies these projections to relative positions, not to tokens.
_POSITION_PROJECTIONS = ("pos_key_proj", "pos_query_proj")
# The second one is what dynamic quantisation puts in the place of the first.
LINEAR = (nn.Linear, torch.ao.nn.quantized.Linear)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations on a text of T tokens: per_text + per_token T + per_pair T^2.

    Matrix products only; a multiply-add counts as two operations.
    """

    per_text: int = 0
    per_token: int = 0
    per_pair: int = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.per_text + other.per_text,
            self.per_token + other.per_token,
            self.per_pair + other.per_pair,
        )

    def at(self, lengths: Tensor) -> Tensor:
        """Operations on texts of these lengths in tokens, float64 [n]."""
        tokens = lengths.to(torch.float64)
        return self.per_text + self.per_token * tokens + self.per_pair * tokens**2


class EncoderLayers:
    """Embeddings, layers and final norm of a BERT-like encoder (BERT, RoBERTa, ELECTRA, …).

    Subclasses override what differs in another family. Texts are padded on the right.
    """

    # True: answers depend on the batch's width, which is then not cut to the longest text left.
    depends_on_batch = False
    has_token_types = True
    attention_implementations: tuple[str, ...] = ("eager", "sdpa", "flash_attention_2")

    def __init__(self, encoder: PreTrainedModel) -> None:
        # Any, because the names of its submodules differ between families.
        self.encoder: Any = encoder
        self.implementation: str = encoder.config._attn_implementation
        self.layers = layer_modules(encoder)

    @property
    def num_layers(self) -> int:
        """Number of layers; the first is layer 1."""
        return len(self.layers)

    def embed(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Return the input of the first layer, [N, T, H], for token ids and masks [N, T]."""
        types = {"token_type_ids": token_type_ids} if self.has_token_types else {}
        hidden = self.encoder.embeddings(input_ids=input_ids, **types)
        project = getattr(self.encoder, "embeddings_project", None)  # ELECTRA
        return hidden if project is None else project(hidden)

    def carried(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the tensors, besides the hidden states, that go along with the texts."""
        return {}

    def advance(self, batch: ActiveBatch, layers: range) -> Tensor:
        """Run some layers on a batch that has passed those before them: [N, T, H]."""
        hidden = batch.hidden
        if batch.context is None:
            padded = int(batch.lengths.min()) < hidden.shape[1]
            batch.context = self.context(hidden, batch.attention_mask, padded)
        for layer in layers:
            hidden = self.run(layer, hidden, batch.context)
        return hidden

    def context(self, hidden_states: Tensor, attention_mask: Tensor, padded: bool) -> LayerContext:
        """Return the layers' other arguments for a batch of this shape and padding.

        hidden_states [N, T, H]: only their shape, dtype and device are read.
        attention_mask [N, T]; `padded`: whether it contains a 0, given so that it need not be read.
        """
        return {"attention_mask": self._mask(hidden_states, attention_mask, padded)}

    def run(self, layer: int, hidden_states: Tensor, context: LayerContext) -> Tensor:
        """Run layer `layer` (1 = first) on the output of the layer before: [N, T, H] each.

        The last layer's output includes the final norm, where the encoder has one.
        """
        output = self.layers[layer - 1](hidden_states, **context)
        # Before transformers 5, and in some families since, a layer returns a tuple.
        return output[0] if isinstance(output, tuple) else output

    def flops(self, layer: int) -> Flops:
        """Floating-point operations of one layer on a text of T tokens, without padding.

        2 T (entries of the layer's weight matrices) + 4 T^2 H for attention over all T tokens.
        """
        width: int = self.encoder.config.hidden_size
        return Flops(per_token=2 * linear_entries(self.layers[layer - 1]), per_pair=4 * width)

    def embedding_flops(self) -> Flops:
        """Operations of the projection before the first layer (ELECTRA); else none."""
        projection = getattr(self.encoder, "embeddings_project", None)
        return Flops(per_token=0 if projection is None else 2 * linear_entries(projection))

    def _mask(self, hidden: Tensor, attention_mask: Tensor, padded: bool) -> Tensor | None:
        if not padded:
            return None
        if self.implementation == "flash_attention_2":
            return attention_mask
        allowed = attention_mask.bool()[:, None, None, :]  # [N, 1, 1, T]
        return allowed if self.implementation == "sdpa" else additive(allowed, hidden.dtype)


def bottom_parameters(encoder: PreTrainedModel, num_layers: int) -> list[Parameter]:
    """The parameters of the first `num_layers` layers, and those that stand before them.

    Raises:
        ValueError: no list of layers is found, there are fewer, or they share weights.
    """
    layers = layer_modules(encoder)
    words = f"freeze_layers={num_layers}"
    if not layers:
        raise ValueError(
            f"{words}: no list of layers is found in {type(encoder).__name__}. Leave it out."
        )
    if num_layers > len(layers):
        raise ValueError(f"{words}: the encoder has {len(layers)} layers. Use that many at most.")
    owned = [set(layer.parameters()) for layer in layers]
    if len(set().union(*owned)) < sum(map(len, owned)):
        raise ValueError(f"{words}: the encoder's layers share weights. Leave it out.")
    every = list(encoder.parameters())
    before = every[: next(index for index, p in enumerate(every) if p in owned[0])]
    return [*before, *(p for layer in owned[:num_layers] for p in layer)]


class DistilBertLayers(EncoderLayers):
    has_token_types = False

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__(encoder)
        names = list(inspect.signature(self.layers[0].forward).parameters)
        self._mask_name = names[1]
        # Before transformers 5, its eager attention expands the [N, T] mask itself.
        self._masks_itself = self._mask_name == "attn_mask" and self.implementation == "eager"

    def context(self, hidden_states: Tensor, attention_mask: Tensor, padded: bool) -> LayerContext:
        if self._masks_itself:
            return {self._mask_name: attention_mask}
        return {self._mask_name: self._mask(hidden_states, attention_mask, padded)}


class MPNetLayers(EncoderLayers):
    has_token_types = False
    attention_implementations = ("eager",)

    def context(self, hidden_states: Tensor, attention_mask: Tensor, padded: bool) -> LayerContext:
        context = super().context(hidden_states, attention_mask, padded)
        # One row suffices: the bias depends on the length alone and is broadcast over the batch.
        context["position_bias"] = self.encoder.encoder.compute_position_bias(hidden_states[:1])
        return context


class DebertaV2Layers(EncoderLayers):
    """DeBERTa v2 and v3; the FLOPs leave out the products with relative positions."""

    attention_implementations = ("eager",)

    def context(self, hidden_states: Tensor, attention_mask: Tensor, padded: bool) -> LayerContext:
        stack = self.encoder.encoder
        return {
            "attention_mask": stack.get_attention_mask(attention_mask),
            "relative_pos": stack.get_rel_pos(hidden_states),
            "rel_embeddings": stack.get_rel_embedding(),
        }

    def run(self, layer: int, hidden_states: Tensor, context: LayerContext) -> Tensor:
        output = super().run(layer, hidden_states, context)
        convolution = self.encoder.encoder.conv
        if layer == 1 and convolution is not None:
            # The first token's row of the [N, 1, T, T] mask is the text's [N, T] mask.
            input_mask = context["attention_mask"][:, 0, 0]
            return convolution(hidden_states, output, input_mask)
        return output

    def embed(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        return self.encoder.embeddings(
            input_ids=input_ids, token_type_ids=token_type_ids, mask=attention_mask
        )


class ModernBertLayers(EncoderLayers):
    """ModernBERT; the FLOPs count local attention as attention over all tokens."""

    has_token_types = False
    attention_implementations = ("eager", "sdpa")

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__(encoder)
        # Before transformers 5, a layer takes both masks and computes the rotary embedding itself.
        self._takes_both_masks = (
            "sliding_window_mask" in inspect.signature(self.layers[0].forward).parameters
        )

    def context(self, hidden_states: Tensor, attention_mask: Tensor, padded: bool) -> LayerContext:
        length = hidden_states.shape[1]
        positions = torch.arange(length, device=hidden_states.device)
        half_window: int = self.encoder.config.local_attention // 2
        near = (positions[:, None] - positions).abs() <= half_window  # [T, T]
        everywhere = attention_mask.bool()[:, None, None, :]  # [N, 1, 1, T]
        masks = {"full_attention": everywhere, "sliding_attention": everywhere & near}
        if self.implementation == "eager":
            masks = {kind: additive(mask, hidden_states.dtype) for kind, mask in masks.items()}
        if self._takes_both_masks:
            return {
                "attention_mask": masks["full_attention"],
                "sliding_window_mask": masks["sliding_attention"],
                "position_ids": positions[None],
            }
        rotary = {
            kind: self.encoder.rotary_emb(hidden_states, positions[None], kind)
            for kind in set(self.encoder.config.layer_types)
        }
        return {"masks": masks, "rotary": rotary}

    def run(self, layer: int, hidden_states: Tensor, context: LayerContext) -> Tensor:
        if not self._takes_both_masks:
            kind = self.layers[layer - 1].attention_type
            context = {
                "attention_mask": context["masks"][kind],
                "position_embeddings": context["rotary"][kind],
            }
        output = super().run(layer, hidden_states, context)
        return self.encoder.final_norm(output) if layer == self.num_layers else output


# Model type -> its layers, where they can be run one by one.
FAMILIES: dict[str, type[EncoderLayers]] = {
    "bert": EncoderLayers,
    "camembert": EncoderLayers,
    "data2vec-text": EncoderLayers,
    "deberta-v2": DebertaV2Layers,
    "distilbert": DistilBertLayers,
    "electra": EncoderLayers,
    "ernie": EncoderLayers,
    "modernbert": ModernBertLayers,
    "mpnet": MPNetLayers,
    "roberta": EncoderLayers,
    "splinter": EncoderLayers,
    "xlm-roberta": EncoderLayers,
}


def layer_modules(encoder: PreTrainedModel) -> list[nn.Module]:
    """Return the encoder's layers in the order in which they run; empty if they share weights.

    They are its outermost list of as many modules as it has layers, called encoder.layer,
    transformer.layer or layers, depending on the family. There is none where layers are spread over
    several lists (XLM).
    """
    num_layers: int = encoder.config.num_hidden_layers
    for module in encoder.modules():
        lists = [
            part
            for part in module.children()
            if isinstance(part, nn.ModuleList) and len(part) == num_layers
        ]
        if lists:
            return list(lists[0]) if len(lists) == 1 else []
    return []


def linear_entries(module: nn.Module) -> int:
    """Number of entries of the weight matrices that every token is multiplied with."""
    return sum(
        part.in_features * part.out_features
        for name, part in module.named_modules()
        if isinstance(part, LINEAR) and name.rpartition(".")[2] not in _POSITION_PROJECTIONS
    )


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Mask to add to attention scores: 0 where `allowed`, the most negative number elsewhere."""
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
