"""Exits: the classifiers that read a layer's hidden states, and what a model with exits has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel


class ExitOutput(NamedTuple):
    embeddings: Tensor  # [N, d], the text's representation h, which the classifier reads
    logits: Tensor  # [N, K]


class Dropout(nn.Dropout):
    """PyTorch's dropout with a faster mask on the CPU, where it took most of an exit's time.

    On the CPU four elements share one 64-bit random number, 16 bits each, so the probability is
    rounded to a multiple of 2^-16, and the scale follows the rounded probability. For [32, 60, 384]
    on one thread: 2.2 ms instead of 8.7 ms; the exit's largest matrix product takes 1 ms.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        threshold = round(self.p * 2**16)
        if x.device.type != "cpu" or not 0 < threshold < 2**16:
            return super().forward(x)
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = draws.view(torch.int16)[: x.numel()].view(x.shape)
        kept = torch.where(bits >= threshold - 2**15, x, 0.0)
        return kept.mul_(1 / (1 - threshold / 2**16))


class LinearExit(nn.Module):
    """Dropout and a linear classifier on the first token's hidden state; d = hidden size."""

    def __init__(self, hidden_size: int, num_labels: int, dropout: float) -> None:
        super().__init__()
        self.dropout = Dropout(dropout)
        self.classifier = nn.Linear(hidden_size, num_labels)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> ExitOutput:
        """Classify hidden_states [N, T, H]; the mask is not read: no first token is padding."""
        embeddings = self.dropout(hidden_states[:, 0])
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
