"""PTX types as NumPy's: "b32" and "u32" are uint32, "s64" is int64, "f16" is float16."""

from __future__ import annotations

from typing import Any

import numpy as np

from .program import SIZES

Array = Any

UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED: dict[int, Any] = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
FLOATING: dict[int, Any] = {2: np.float16, 4: np.float32, 8: np.float64}
BY_LETTER = {"b": UNSIGNED, "u": UNSIGNED, "s": SIGNED, "f": FLOATING}


def size_of(kind: str) -> int:
    """Bytes of a PTX type."""
    return SIZES[kind[1:]]


def dtype_of(kind: str) -> Any:
    """NumPy's type for a PTX type; bool for a predicate."""
    return np.bool_ if kind == "pred" else BY_LETTER[kind[0]][size_of(kind)]


def bits_of(kind: str) -> Any:
    """The unsigned type of the same size, in which registers are kept."""
    return np.bool_ if kind == "pred" else UNSIGNED[size_of(kind)]


def constant(text: str, kind: str) -> Array:
    """A number as it stands in an instruction."""
    if kind == "pred":
        return np.bool_(int(text) != 0)
    if text[:2].lower() == "0f":
        return np.uint32(int(text[2:], 16)).view(dtype_of(kind))
    if text[:2].lower() == "0d":
        return np.uint64(int(text[2:], 16)).view(dtype_of(kind))
    size = size_of(kind)
    return UNSIGNED[size](int(text.rstrip("U"), 0) % (1 << 8 * size)).view(dtype_of(kind))
