"""Texts that go through the encoder together and have not left it yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from .exit_policies import Memory

# int64 [N]: row indices, or numbers of tokens.
Rows = NDArray[np.int64]
# Keyword arguments of a family's layers besides the hidden states.
LayerContext = dict[str, Any]


@dataclass
class ActiveBatch:
    """N texts between two layers. rows [N]: their places in the input; lengths [N]: their tokens.

    carried: other tensors [N, T] or [N, T, H] that later layers need.
    Rows and lengths are NumPy arrays, as in `EncodedSplit`: an operation of PyTorch on a few
    numbers between two layers takes tens of microseconds, its code having left the cache.
    """

    rows: Rows
    lengths: Rows
    hidden: Tensor  # [N, T, H]
    attention_mask: Tensor  # [N, T]
    memory: Memory
    carried: dict[str, Tensor] = field(default_factory=dict)
    # Computed at the first layer that runs on these rows at this width.
    context: LayerContext | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, keep: Rows, *, cut: bool = True) -> ActiveBatch:
        """The texts with the indices `keep`; with `cut`, as wide as the longest of them."""
        lengths = self.lengths[keep]
        width = int(lengths.max()) if cut else self.hidden.shape[1]
        index = torch.from_numpy(keep).to(self.hidden.device)
        return ActiveBatch(
            self.rows[keep],
            lengths,
            self.hidden[:, :width].index_select(0, index),
            self.attention_mask[:, :width].index_select(0, index),
            {name: value.index_select(0, index) for name, value in self.memory.items()},
            {name: value[:, :width].index_select(0, index) for name, value in self.carried.items()},
        )


def regroup(batches: Sequence[ActiveBatch], batch_size: int) -> list[ActiveBatch]:
    """Batches at the same exit, regrouped into batches of `batch_size`, the last one smaller."""
    if not batches:
        return []
    together = _concatenated(batches)
    if len(together) <= batch_size:
        return [together]
    places = np.arange(len(together))
    return [
        together.select(places[first : first + batch_size])
        for first in range(0, len(together), batch_size)
    ]


def _concatenated(batches: Sequence[ActiveBatch]) -> ActiveBatch:
    """One batch, padded to the longest text."""
    if len(batches) == 1:
        return batches[0]
    width = max(batch.hidden.shape[1] for batch in batches)

    def joined(values: list[Tensor]) -> Tensor:
        return torch.cat(
            [
                functional.pad(value, (0, 0) * (value.dim() - 2) + (0, width - value.shape[1]))
                for value in values
            ]
        )

    return ActiveBatch(
        np.concatenate([batch.rows for batch in batches]),
        np.concatenate([batch.lengths for batch in batches]),
        joined([batch.hidden for batch in batches]),
        joined([batch.attention_mask for batch in batches]),
        {name: torch.cat([batch.memory[name] for batch in batches]) for name in batches[0].memory},
        {name: joined([batch.carried[name] for batch in batches]) for name in batches[0].carried},
    )


def token_counts(attention_mask: Tensor) -> Rows:
    """Tokens of each right-padded text, int64 [N].

    Raises:
        ValueError: no text, a text without a token, or padding before a token.
    """
    # NumPy has no bfloat16, which a mask may be in.
    mask = attention_mask.bool().cpu().numpy()
    if mask.shape[0] == 0:
        raise ValueError("input_ids has no rows: there is nothing to predict.")
    # In a right-padded mask, no 1 follows a 0.
    if not mask[:, 0].all() or (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError(
            "attention_mask: each text needs at least one token, and its padding on the right "
            "(tokenizer.padding_side = 'right')."
        )
    lengths: Rows = mask.sum(axis=1, dtype=np.int64)
    return lengths
