"""Cases and inputs of the gate's suite, with the parameter shapes of BERT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Above every norm here: the clipping factor is computed, but repeated calls do not shrink anything.
MAX_NORM = 1e9
BERT_BASE = 109_482_240


def bert_shapes(num_layers: int, hidden: int = 768, vocabulary: int = 30522) -> list[list[int]]:
    """Parameter shapes of BERT with its pooler; BERT-base has 199 tensors."""
    norm = [[hidden], [hidden]]
    layer = [[hidden, hidden], [hidden]] * 4 + norm
    layer += [[4 * hidden, hidden], [4 * hidden], [hidden, 4 * hidden], [hidden], *norm]
    embeddings = [[vocabulary, hidden], [512, hidden], [2, hidden], *norm]
    return embeddings + layer * num_layers + [[hidden, hidden], [hidden]]


def num_elements(shapes: Sequence[Sequence[int]]) -> int:
    return sum(math.prod(shape) for shape in shapes)


@dataclass(frozen=True)
class AngleCase:
    """A task and about so many elements in each of the two lists, in the shapes of a BERT."""

    task: str
    parameters: int
    dtype: str = "float32"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def shapes(self) -> list[list[int]]:
        """Those of a 12-layer BERT whose vocabulary is 40 times its width, as in BERT-base."""
        if self.parameters == BERT_BASE:
            return bert_shapes(num_layers=12)
        hidden = max(1, round(math.sqrt(self.parameters / (12 * 12 + 40))))
        return bert_shapes(num_layers=12, hidden=hidden, vocabulary=40 * hidden)

    @property
    def elements(self) -> int:
        return num_elements(self.shapes)


@dataclass
class AngleInputs:
    """Two lists of gradients at an angle below 90 degrees, and their `grad_dot_norm`.

    one: a loss scale on the device. found_inf: where unscaling reports values that are not finite.
    """

    a: list[Tensor]
    b: list[Tensor]
    stats: Tensor
    max_norm: float = MAX_NORM

    def __post_init__(self) -> None:
        self.one = torch.ones((), device=self.stats.device)
        self.found_inf = torch.zeros_like(self.one)
