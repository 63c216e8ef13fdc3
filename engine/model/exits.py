"""Exits: the classifiers that read a layer's hidden states, and what a model with exits has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ..runtime.dropout import Dropout


class ExitOutput(NamedTuple):
    embeddings: Tensor  # [N, d], the text's representation h, which the classifier reads
    logits: Tensor  # [N, K]


class LinearExit(nn.Module):
    """Dropout and a linear classifier on one hidden state per text; d = hidden size.

    pooling: "first", the first token's state (the paper's), or "mean", the mean over the tokens,
    for encoders that were pretrained with it.
    """

    def __init__(
        self, hidden_size: int, num_labels: int, dropout: float, pooling: str = "first"
    ) -> None:
        super().__init__()
        self.pooling = pooling
        self.dropout = Dropout(dropout)
        self.classifier = nn.Linear(hidden_size, num_labels)

    def text_states(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """The state [N, H] of each text, from hidden_states [N, T, H] and the mask [N, T]."""
        if self.pooling == "first":
            return hidden_states[:, 0]  # it is never padding
        is_token = attention_mask.bool()[..., None]  # [N, T, 1]
        # Not in half precision: 512 tokens may add up to more than float16 holds.
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        total = hidden_states.masked_fill(~is_token, 0.0).sum(dim=1, dtype=dtype)
        return (total / is_token.sum(dim=1)).to(hidden_states.dtype)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> ExitOutput:
        """Classify hidden_states [N, T, H]; attention_mask [N, T]: 1 for tokens, 0 for padding."""
        embeddings = self.dropout(self.text_states(hidden_states, attention_mask))
        return ExitOutput(embeddings, self.classifier(embeddings))


class MHAExit(nn.Module):
    """Down-projection, tanh, self-attention over the tokens, first token, tanh, linear classifier.

    The classifier has no bias (paper eq. 3), so its rows [K, d] are the label embeddings. The paper
    gives neither the number of heads nor the place of dropout. Here dropout acts on the hidden
    states and on the attention weights, so the representation itself is not perturbed.
    Only the first token's query is computed: no other row of the attention is read.
    """

    def __init__(
        self, hidden_size: int, num_labels: int, dropout: float, width: int, num_heads: int
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(
                f"exit_width={width} is not a multiple of exit_attention_heads={num_heads}."
            )
        self.num_heads = num_heads
        self.dropout = Dropout(dropout)
        self.down_projection = nn.Linear(hidden_size, width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)
        self.classifier = nn.Linear(width, num_labels, bias=False)

    def text_states(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """The state [N, H] of the token whose query is computed, the first."""
        return hidden_states[:, 0]

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> ExitOutput:
        """Classify hidden_states [N, T, H]; attention_mask [N, T]: 1 for tokens, 0 for padding."""
        tokens = torch.tanh(self.down_projection(self.dropout(hidden_states)))  # [N, T, d]
        num_samples, _, width = tokens.shape
        heads = (num_samples, -1, self.num_heads, width // self.num_heads)
        query = self.query(tokens[:, :1]).view(heads).transpose(1, 2)  # [N, heads, 1, d / heads]
        key, value = (
            part.reshape(heads).transpose(1, 2)  # [N, heads, T, d / heads]
            for part in self.key_value(tokens).chunk(2, dim=-1)
        )
        attended = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask[:, None, None, :].bool(),
            dropout_p=self.dropout.p if self.training else 0.0,
        )  # [N, heads, 1, d / heads]
        first = attended.transpose(1, 2).reshape(num_samples, width)
        embeddings = torch.tanh(self.output(first))
        return ExitOutput(embeddings, self.classifier(embeddings))


Exit = LinearExit | MHAExit


class Exits(nn.Module):
    """The exits of a model, in the order of their layers.

    Not an nn.ModuleList: PEFT and device maps put a wrapper around a module or hooks on its call,
    and a list is never called.
    """

    def __init__(self, heads: Iterable[Exit]) -> None:
        super().__init__()
        for index, head in enumerate(heads):
            self.add_module(str(index), head)

    @property
    def heads(self) -> list[Exit]:
        """The modules; unlike indices, this attribute also exists on PEFT's wrapper."""
        return cast(list[Exit], list(self.children()))

    def forward(
        self, hidden_states: Sequence[Tensor], attention_mask: Tensor, positions: Sequence[int]
    ) -> list[ExitOutput]:
        """Run the exits at `positions`, each on its own hidden states [N, T, H]."""
        heads = self.heads
        return [
            heads[position](hidden, attention_mask)
            for position, hidden in zip(positions, hidden_states, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.heads)

    def __iter__(self) -> Iterator[Exit]:
        return iter(self.heads)

    def __getitem__(self, index: int | slice) -> Any:
        found = self.heads[index]
        return Exits(found) if isinstance(found, list) else found


class ExitModel(PreTrainedModel):
    """An encoder with exits on some of its layers: what early exit and FLOPs know of the model.

    exit_layers: layers (1 = first) that carry an exit, ascending; exits: one module per such layer;
    learned_exit: what the policy "learned" reads, None until it has been fitted.
    """

    backbone: PreTrainedModel
    exit_layers: list[int]
    exits: Exits
    learned_exit: nn.Linear | None

    def __setattr__(self, name: str, value: Any) -> None:
        # PEFT stores {adapter: settings} here after it has wrapped `modules_to_save`, to which
        # task_type="SEQ_CLS" adds "classifier" and "score". PeftModel then goes through them once
        # more; a classifier that is wrapped inside the wrapped exits cannot be loaded.
        if name == "peft_config":
            for settings in value.values():
                if "exits" in (getattr(settings, "modules_to_save", None) or ()):
                    settings.modules_to_save = [
                        module
                        for module in settings.modules_to_save
                        if module not in ("classifier", "score")
                    ]
        super().__setattr__(name, value)


def check_padding(attention_mask: Tensor | None) -> None:
    """Refuse a mask [N, T] that hides a first token, which the exits read.

    Raises:
        ValueError: padding on the left.
    """
    # While a graph is recorded, the mask has no values.
    if attention_mask is None or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    if not attention_mask[:, 0].all():
        raise ValueError(
            "attention_mask: the first token of a text is masked, so its padding is on the left. "
            "Exits need it on the right (tokenizer.padding_side = 'right')."
        )


def checked_attentions(encoded: Any, config: PretrainedConfig) -> tuple[Tensor, ...]:
    """The attention weights of an encoder's output.

    Raises:
        ValueError: there are none, as with fused attention.
    """
    attentions = getattr(encoded, "attentions", None)
    if not attentions or any(weights is None for weights in attentions):
        raise ValueError(
            f"output_attentions=True: the encoder ({config.model_type}) gives no attention weights "
            f"with attn_implementation={config._attn_implementation!r}. Load the model with "
            'attn_implementation="eager".'
        )
    return attentions


_BY_EXIT = ("exit_logits", "exit_embeddings")


@dataclass
class MultiExitOutput(ModelOutput):
    """Outputs of E exits for N samples and K labels.

    loss: sum of the exits' mean cross-entropies, None without labels.
    logits [N, K]: those of the last exit.  exit_logits [E, N, K].
    exit_embeddings [E, N, d]: the representations that the classifiers read.
    hidden_states, attentions: the encoder's, one [N, T, H] or [N, heads, T, T] per layer, if asked.

    Its keys and items, which pipelines, Trainer and DataParallel split or join along the first
    axis, have the samples there: logits_by_text [N, E, K] and embeddings_by_text [N, E, d]. They
    share memory with exit_logits and exit_embeddings.
    """

    loss: Tensor | None = None
    # Always set; ModelOutput requires a default for every field but the first.
    logits: Tensor = None  # type: ignore[assignment]
    logits_by_text: Tensor = None  # type: ignore[assignment]
    embeddings_by_text: Tensor = None  # type: ignore[assignment]
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

    def __init__(
        self,
        loss: Any = None,  # or the items, as all outputs of transformers take them
        logits: Tensor | None = None,
        logits_by_text: Tensor | None = None,
        embeddings_by_text: Tensor | None = None,
        hidden_states: tuple[Tensor, ...] | None = None,
        attentions: tuple[Tensor, ...] | None = None,
        *,
        exit_logits: Tensor | None = None,
        exit_embeddings: Tensor | None = None,
    ) -> None:
        if exit_logits is not None:
            logits_by_text = exit_logits.transpose(0, 1)
        if exit_embeddings is not None:
            embeddings_by_text = exit_embeddings.transpose(0, 1)
        values = (loss, logits, logits_by_text, embeddings_by_text, hidden_states, attentions)
        for field, value in zip(fields(self), values, strict=True):
            setattr(self, field.name, value)
        self.__post_init__()

    @property
    def exit_logits(self) -> Tensor:
        return self.logits_by_text.transpose(0, 1)

    @exit_logits.setter
    def exit_logits(self, value: Tensor) -> None:
        self.logits_by_text = value.transpose(0, 1)

    @property
    def exit_embeddings(self) -> Tensor:
        return self.embeddings_by_text.transpose(0, 1)

    @exit_embeddings.setter
    def exit_embeddings(self, value: Tensor) -> None:
        self.embeddings_by_text = value.transpose(0, 1)

    def __getitem__(self, key: Any) -> Any:
        return getattr(self, key) if key in _BY_EXIT else super().__getitem__(key)

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are not None: loss, logits, exit_logits, exit_embeddings, …"""
        names = ("loss", "logits", *_BY_EXIT, "hidden_states", "attentions")
        return tuple(value for name in names if (value := getattr(self, name)) is not None)
