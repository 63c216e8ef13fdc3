"""Output of a model with exits."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput

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
        """What was computed of loss, logits, exit_logits, exit_embeddings, hidden_states, …"""
        names = ("loss", "logits", *_BY_EXIT, "hidden_states", "attentions")
        return tuple(value for name in names if (value := getattr(self, name)) is not None)
