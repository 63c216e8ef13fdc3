"""A case of the loss's benchmark and its inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOSSES = ("supcon", "acl")


@dataclass(frozen=True)
class LossCase:
    """supcon: M = samples, random labels of `classes`. acl: N = samples, K = classes, E = exits."""

    loss: str
    samples: int
    width: int
    classes: int
    exits: int = 1
    dtype: str = "float32"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def num_rows(self) -> int:
        """Of one exit, label embeddings included."""
        return self.samples + (self.classes if self.loss == "acl" else 0)


@dataclass
class LossInputs:
    """upstream: the mean makes gradients of 1 / M; as a loss scale it keeps float16 in range."""

    embeddings: Tensor
    labels: Tensor
    label_embeddings: Tensor | None
    upstream: float

    @property
    def leaves(self) -> list[Tensor]:
        label_rows = [] if self.label_embeddings is None else [self.label_embeddings]
        return [self.embeddings, *label_rows]
