"""A case of the gate's benchmark and its inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .shapes import num_elements, shapes_of

# Above every norm here, so that repeated calls change no scale; the factor is computed.
MAX_NORM = 1e9


@dataclass(frozen=True)
class AngleCase:
    """parameters: elements of each of the two lists (BERT's shapes, about so many)."""

    task: str
    parameters: int
    dtype: str = "float32"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def shapes(self) -> list[list[int]]:
        return shapes_of(self.parameters)

    @property
    def elements(self) -> int:
        return num_elements(self.shapes)


@dataclass
class AngleInputs:
    """Two lists of gradients a little less than 90 degrees apart, and their sums."""

    a: list[Tensor]
    b: list[Tensor]
    stats: Tensor
    max_norm: float = MAX_NORM
