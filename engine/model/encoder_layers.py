"""An encoder of transformers, run one layer at a time.

The layers' call signatures and masks differ between families and between versions of transformers;
here they are one. The layers themselves and their attention implementation are the encoder's own.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .multi_exit import MultiExitForSequenceClassification

# What a family's layers take besides the hidden states.
LayerContext = dict[str, Any]
# DeBERTa's projections of relative positions are not applied to tokens.
_POSITION_PROJECTIONS = ("pos_key_proj", "pos_query_proj")


@dataclass(frozen=True)
class Flops:
    """Floating-point operations on a text of T tokens: per_text + per_token T + per_pair T^2.

    Those of matrix products, a multiply and an add being two; elementwise work is not counted.
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
        """Of texts with these numbers of tokens: float64 [n]."""
        tokens = lengths.to(torch.float64)
        return self.per_text + self.per_token * tokens + self.per_pair * tokens**2


class EncoderLayers:
    """Embeddings, layers and final norm of a BERT-like encoder (BERT, RoBERTa, ELECTRA, …).

    Subclasses say where another family differs. Texts are padded on the right.
    """

    takes_token_types = True
    attention_implementations: tuple[str, ...] = ("eager", "sdpa", "flash_attention_2")

    def __init__(self, encoder: PreTrainedModel) -> None:
        # Any: what its submodules are called differs between families.
        self.encoder: Any = encoder
        self.implementation: str = encoder.config._attn_implementation
        if self.implementation not in self.attention_implementations:
            raise ValueError(
                f"attn_implementation={self.implementation!r}: a {encoder.config.model_type} "
                "encoder is run layer by layer with one of "
                f"{', '.join(self.attention_implementations)} only."
            )
        self.layers = self._layers()

    @property
    def num_layers(self) -> int:
        """Layers of the encoder; the first is number 1."""
        return len(self.layers)

    def embed(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Token ids and masks [N, T] -> what the first layer reads, [N, T, H].

        Raises:
            ValueError: token types for an encoder that has none.
        """
        if token_type_ids is not None and not self.takes_token_types:
            raise ValueError(
                f"token_type_ids: a {self.encoder.config.model_type} encoder takes none; leave "
                "them out."
            )
        return self._embed(input_ids, attention_mask, token_type_ids)

    def context(self, hidden_states: Tensor, attention_mask: Tensor, padded: bool) -> LayerContext:
        """What every layer takes besides its input, for a batch of this shape and padding.

        hidden_states [N, T, H]: read for their shape, dtype and device only.
        attention_mask [N, T]; `padded`: whether it has a 0 (known without asking the device).
        """
        return {"attention_mask": self._mask(hidden_states, attention_mask, padded)}

    def run(self, layer: int, hidden_states: Tensor, context: LayerContext) -> Tensor:
        """The output of layer `layer` (1 = first) on that of the one before: [N, T, H] each.

        After the last layer, the final norm where the encoder has one: what an exit there reads.
        """
        output = self.layers[layer - 1](hidden_states, **context)
        # A tuple before transformers 5, and in some families later too.
        return output[0] if isinstance(output, tuple) else output

    def flops(self, layer: int) -> Flops:
        """Floating-point operations of one layer on a text of T tokens, without padding.

        2 T (entries of the layer's weight matrices) + 4 T^2 H, attention being over all T tokens.
        """
        width: int = self.encoder.config.hidden_size
        return Flops(per_token=2 * linear_entries(self.layers[layer - 1]), per_pair=4 * width)

    def embedding_flops(self) -> Flops:
        """Operations before the first layer, where they are a matrix product (ELECTRA)."""
        projection = getattr(self.encoder, "embeddings_project", None)
        return Flops(per_token=0 if projection is None else 2 * projection.weight.numel())

    def _layers(self) -> nn.ModuleList:
        return self.encoder.encoder.layer

    def _embed(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None
    ) -> Tensor:
        hidden = self.encoder.embeddings(input_ids=input_ids, token_type_ids=token_type_ids)
        project = getattr(self.encoder, "embeddings_project", None)  # ELECTRA
        return hidden if project is None else project(hidden)

    def _mask(self, hidden: Tensor, attention_mask: Tensor, padded: bool) -> Tensor | None:
        if not padded:
            return None
        if self.implementation == "flash_attention_2":
            return attention_mask
        allowed = attention_mask.bool()[:, None, None, :]  # [N, 1, 1, T]
        return allowed if self.implementation == "sdpa" else _additive(allowed, hidden.dtype)


class DistilBertLayers(EncoderLayers):
    takes_token_types = False

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__(encoder)
        names = list(inspect.signature(self.layers[0].forward).parameters)
        self._mask_name = names[1]
        # Before transformers 5, its eager attention makes its own mask of the [N, T] one.
        self._masks_itself = self._mask_name == "attn_mask" and self.implementation == "eager"

    def context(self, hidden_states: Tensor, attention_mask: Tensor, padded: bool) -> LayerContext:
        if self._masks_itself:
            return {self._mask_name: attention_mask}
        return {self._mask_name: self._mask(hidden_states, attention_mask, padded)}

    def _layers(self) -> nn.ModuleList:
        return self.encoder.transformer.layer

    def _embed(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None
    ) -> Tensor:
        return self.encoder.embeddings(input_ids)


class MPNetLayers(EncoderLayers):
    takes_token_types = False
    attention_implementations = ("eager",)

    def context(self, hidden_states: Tensor, attention_mask: Tensor, padded: bool) -> LayerContext:
        context = super().context(hidden_states, attention_mask, padded)
        # Of one row: the bias depends on the length alone and is broadcast over the batch.
        context["position_bias"] = self.encoder.encoder.compute_position_bias(hidden_states[:1])
        return context

    def _embed(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None
    ) -> Tensor:
        return self.encoder.embeddings(input_ids=input_ids)


class DebertaV2Layers(EncoderLayers):
    """DeBERTa v2 and v3. Its products with relative positions are not in the FLOPs."""

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
            # Of the mask's [N, 1, T, T] rows, the first token's is the text's own mask.
            input_mask = context["attention_mask"][:, 0, 0]
            return convolution(hidden_states, output, input_mask)
        return output

    def _embed(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None
    ) -> Tensor:
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        return self.encoder.embeddings(
            input_ids=input_ids, token_type_ids=token_type_ids, mask=attention_mask
        )


class ModernBertLayers(EncoderLayers):
    """ModernBERT; the FLOPs count local attention as if it were over all tokens."""

    takes_token_types = False
    attention_implementations = ("eager", "sdpa")

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__(encoder)
        # Before transformers 5, a layer takes both masks and computes its rotary embedding itself.
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
            masks = {kind: _additive(mask, hidden_states.dtype) for kind, mask in masks.items()}
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

    def _layers(self) -> nn.ModuleList:
        return self.encoder.layers

    def _embed(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None
    ) -> Tensor:
        return self.encoder.embeddings(input_ids=input_ids)


_FAMILIES: dict[str, type[EncoderLayers]] = {
    "bert": EncoderLayers,
    "camembert": EncoderLayers,
    "deberta-v2": DebertaV2Layers,
    "distilbert": DistilBertLayers,
    "electra": EncoderLayers,
    "modernbert": ModernBertLayers,
    "mpnet": MPNetLayers,
    "roberta": EncoderLayers,
    "xlm-roberta": EncoderLayers,
}
SUPPORTED_MODEL_TYPES = tuple(_FAMILIES)


def encoder_layers(encoder: PreTrainedModel) -> EncoderLayers:
    """The layers of an encoder (the model without a task's head), whatever its family.

    Raises:
        ValueError: a family, or an attention implementation of it, that is not known here.
    """
    model_type = encoder.config.model_type
    if model_type not in _FAMILIES:
        raise ValueError(
            f"{model_type}: an encoder of this type cannot be run layer by layer here. Supported: "
            f"{', '.join(SUPPORTED_MODEL_TYPES)}."
        )
    if getattr(encoder.config, "is_decoder", False):
        raise ValueError(f"This {model_type} model is a decoder (is_decoder=True): use an encoder.")
    return _FAMILIES[model_type](encoder)


def linear_entries(module: nn.Module) -> int:
    """Entries of the weight matrices that every token of a text is multiplied with."""
    return sum(
        part.weight.numel()
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and name.rpartition(".")[2] not in _POSITION_PROJECTIONS
    )


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where attention is allowed, the most negative number elsewhere."""
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


def stacked_layers(model: MultiExitForSequenceClassification, num_top: int) -> list[nn.Module]:
    """The encoder's last `num_top` layers, in the order in which they run.

    Raises:
        ValueError: it has fewer, or no list of as many modules as it has layers.
    """
    number = model.config.backbone_config.num_hidden_layers
    if num_top > number:
        raise ValueError(
            f"gate_scope=top:{num_top}: the encoder has {number} layers. Use top:{number} at most, "
            "or all."
        )
    for module in model.backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return list(module)[-num_top:]
    raise ValueError(
        f"gate_scope=top:{num_top}: no list of {number} layers is found in "
        f"{type(model.backbone).__name__}. Use all or head."
    )
