"""Lists of parameter shapes whose gradients are checked."""

import math
from collections.abc import Sequence

BERT_BASE = 109_482_240


def bert_shapes(num_layers: int, hidden: int = 768, vocabulary: int = 30522) -> list[list[int]]:
    """Parameter shapes of BERT-base with its pooler: 199 tensors, 109,482,240 elements."""
    norm = [[hidden], [hidden]]
    layer = [[hidden, hidden], [hidden]] * 4 + norm
    layer += [[4 * hidden, hidden], [4 * hidden], [hidden, 4 * hidden], [hidden], *norm]
    embeddings = [[vocabulary, hidden], [512, hidden], [2, hidden], *norm]
    return embeddings + layer * num_layers + [[hidden, hidden], [hidden]]


def shapes_of(parameters: int) -> list[list[int]]:
    """BERT-base's shapes for its own number of parameters; else 12 layers of about so many.

    The vocabulary is 40 rows a unit of width, as BERT-base has it.
    """
    if parameters == BERT_BASE:
        return bert_shapes(num_layers=12)
    hidden = max(1, round(math.sqrt(parameters / (12 * 12 + 40))))
    return bert_shapes(num_layers=12, hidden=hidden, vocabulary=40 * hidden)


def num_elements(shapes: Sequence[Sequence[int]]) -> int:
    return sum(math.prod(shape) for shape in shapes)
