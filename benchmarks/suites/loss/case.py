"""Cases and inputs of the loss's suite."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOSSES = ("supcon", "acl", "acl_cl")


@dataclass(frozen=True)
class LossCase:
    """Shapes: supcon has M = samples; acl and acl_cl have N = samples, K = classes, E = exits."""

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
    def num_trained(self) -> int:
        """Rows of one exit, including label embeddings."""
        return self.samples + (0 if self.loss == "supcon" else self.classes)

    @property
    def num_rows(self) -> int:
        """Rows of one exit and of its teacher."""
        return self.num_trained * (2 if self.loss == "acl_cl" else 1)


@dataclass
class LossInputs:
    """Rows, labels and `upstream`, a loss scale: the mean's gradients of 1 / M are too small for
    float16.
    """

    embeddings: Tensor
    labels: Tensor
    label_embeddings: Tensor | None
    upstream: float
    # Samples and label embeddings of the teacher, for acl_cl.
    teachers: tuple[Tensor, ...] = ()

    @property
    def leaves(self) -> list[Tensor]:
        return [rows for rows in (self.embeddings, self.label_embeddings) if rows is not None]
