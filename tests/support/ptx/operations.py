"""Instructions that compute a value of a thread from values of the same thread.

Each is a function of NumPy arrays with one element per thread. They use only operations that
IEEE 754 or integer arithmetic defines, so that every processor gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .number_types import SIGNED, UNSIGNED, Array, dtype_of, size_of
from .program import Instruction, PtxError


@dataclass(frozen=True)
class Operation:
    """A function of arrays of the types `sources`, whose result is of the type `result`.

    relative_error: by how much a GPU's result may differ, by the ISA; 0 if it is rounded correctly.
    """

    sources: tuple[str, ...]
    result: str
    function: Callable[..., Array]
    relative_error: float = 0.0


def operation(instruction: Instruction) -> Operation | None:
    """The operation of an instruction, None if it is not one of this file's."""
    define = DEFINITIONS.get(instruction.name)
    if define is None:
        return None
    found: Operation | None = define(instruction)
    if found is None:
        raise PtxError(f"unknown instruction: {instruction}")
    return found


# Arithmetic

Define = Callable[[Instruction], Operation | None]


def same_type(function: Callable[..., Array], num_sources: int = 2) -> Define:
    """Sources and result have the type of the last suffix, and `.ftz` flushes them."""

    def define(instruction: Instruction) -> Operation | None:
        kind = instruction.suffixes[-1]
        if "sat" in instruction.suffixes or kind not in PLAIN_TYPES:
            return None
        chosen = flushed(function) if "ftz" in instruction.suffixes else function
        return Operation((kind,) * num_sources, kind, chosen)

    return define


PLAIN_TYPES = {letter + size for letter in "bus" for size in ("16", "32", "64")}
PLAIN_TYPES |= {"f16", "f32", "f64", "pred"}


def flush(value: Array) -> Array:
    """Subnormal numbers become zeros of their sign."""
    tiny = np.finfo(value.dtype).tiny
    return np.where(np.abs(value) < tiny, np.copysign(value.dtype.type(0), value), value)


def flushed(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda *values: flush(function(*(flush(value) for value in values)))


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """Rounds twice, to twice the digits first: that differs from one rounding once in 2^29.

    In float64, where NumPy has no more digits, product and sum are rounded.
    """
    wider = {2: np.float32, 4: np.float64, 8: np.float64}[a.dtype.itemsize]
    return (a.astype(wider) * b + c).astype(a.dtype)


def multiply(instruction: Instruction) -> Operation | None:
    return multiply_and_add(instruction, has_addend=False)


def multiply_and_add(instruction: Instruction, has_addend: bool = True) -> Operation | None:
    """mul and mad: the low half of the product, the high half, or the whole."""
    kind, addends = instruction.suffixes[-1], 1 if has_addend else 0
    if "wide" in instruction.suffixes:
        wide = kind[0] + str(2 * int(kind[1:]))
        dtype = dtype_of(wide)

        def whole(a: Array, b: Array, *c: Array) -> Array:
            product = a.astype(dtype) * b.astype(dtype)
            return product + c[0] if c else product

        return Operation((kind, kind, *(wide,) * addends), wide, whole)
    if "hi" in instruction.suffixes:
        return Operation((kind, kind), kind, high_half) if kind[1:] in ("16", "32") else None
    if has_addend:
        return same_type(lambda a, b, c: a * b + c, 3)(instruction)
    return same_type(lambda a, b: a * b)(instruction)


def high_half(a: Array, b: Array) -> Array:
    size = a.dtype.itemsize
    wide = (SIGNED if a.dtype.kind == "i" else UNSIGNED)[2 * size]
    return ((a.astype(wide) * b.astype(wide)) >> wide(8 * size)).astype(a.dtype)


def divide(instruction: Instruction) -> Operation | None:
    kind = instruction.suffixes[-1]
    if kind[0] != "f":
        return Operation((kind, kind), kind, divide_integers)
    return approximate(lambda a, b: a / b, 2.0**-22, 2)(instruction)


def divide_integers(a: Array, b: Array) -> Array:
    """Towards zero; a GPU's quotient by zero is not defined."""
    b = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // b
    if a.dtype.kind == "i":
        quotient = quotient + ((quotient * b != a) & ((a < 0) != (b < 0))).astype(a.dtype)
    return quotient


def approximate(
    function: Callable[..., Array], relative_error: float, num_sources: int = 1
) -> Define:
    """Rounded correctly with `.rn`, else with an error of up to `relative_error`."""

    def define(instruction: Instruction) -> Operation | None:
        plain = same_type(function, num_sources)(instruction)
        if plain is None or "rn" in instruction.suffixes:
            return plain
        return Operation(plain.sources, plain.result, plain.function, relative_error)

    return define


def exp2(x: Array) -> Array:
    """2^x in float32, from a power series in float64: NumPy's differs between processors."""
    x = x.astype(np.float64)
    whole = np.rint(np.clip(x, -400.0, 400.0))
    power = (np.clip(x, -400.0, 400.0) - whole) * math.log(2)
    result = np.ones_like(power)
    for degree in range(14, 0, -1):
        result = 1.0 + result * power / degree
    return np.ldexp(result, np.nan_to_num(whole).astype(np.int32)).astype(np.float32)


# Bits


def shift(instruction: Instruction) -> Operation:
    """shl and shr: a shift by all bits or more leaves zeros, or copies of the sign."""
    kind, left = instruction.suffixes[-1], instruction.name == "shl"
    dtype, width = dtype_of(kind), 8 * size_of(kind)

    def function(a: Array, by: Array) -> Array:
        inside = np.minimum(by, np.uint32(width - 1)).astype(dtype)
        shifted = a << inside if left else a >> inside
        return shifted if kind[0] == "s" else np.where(by < width, shifted, dtype(0))

    return Operation((kind, "u32"), kind, function)


def extract_bits(instruction: Instruction) -> Operation | None:
    """bfe with constant position and length, which end inside the number."""
    kind = instruction.suffixes[-1]
    position, length = (int(operand, 0) for operand in instruction.operands[2:])
    width, dtype = 8 * size_of(kind), dtype_of(kind)
    if not 0 < length <= width - position:
        return None
    up, down = dtype(width - position - length), dtype(width - length)
    return Operation((kind,), kind, lambda a: (a << up) >> down)


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """prmt: four of the eight bytes of a and b, or their signs, as four hexadecimal digits say."""
    eight = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.uint64(0)
    for place in range(0, 16, 4):
        digit = (selector >> np.uint32(place)) & np.uint32(15)
        byte = (eight >> (digit & np.uint32(7)).astype(np.uint64) * np.uint64(8)) & np.uint64(255)
        sign = np.where(byte >= 128, np.uint64(255), np.uint64(0))
        chosen = np.where(digit & np.uint32(8), sign, byte)
        result = result | (chosen << np.uint64(2 * place))
    return result.astype(np.uint32)


# Comparisons


def unordered(compare: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)


def differs(a: Array, b: Array) -> Array:
    """False for a NaN, which `!=` is not."""
    return (a < b) | (a > b)


ORDERED = {"eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}
ORDERED |= {"ge": np.greater_equal}
INTEGER_COMPARISONS = ORDERED | {"ne": np.not_equal, "lo": np.less, "ls": np.less_equal}
INTEGER_COMPARISONS |= {"hi": np.greater, "hs": np.greater_equal}
FLOATING_COMPARISONS = ORDERED | {"ne": differs}
FLOATING_COMPARISONS |= {
    f"{name}u": unordered(compare) for name, compare in FLOATING_COMPARISONS.items()
}
FLOATING_COMPARISONS |= {
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
}
COMBINATIONS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def compare(instruction: Instruction) -> Operation | None:
    """setp, also with a predicate to combine with the comparison."""
    kind, (name, *middle) = instruction.suffixes[-1], instruction.suffixes[:-1]
    table = FLOATING_COMPARISONS if kind[0] == "f" else INTEGER_COMPARISONS
    function = table.get(name)
    if function is None or "|" in instruction.operands[0]:
        return None
    if not middle:
        return Operation((kind, kind), "pred", function)
    combine = COMBINATIONS.get(middle[-1])
    if combine is None:
        return None
    return Operation(
        (kind, kind, "pred"), "pred", lambda a, b, other: combine(function(a, b), other)
    )


def select(instruction: Instruction) -> Operation:
    kind = instruction.suffixes[-1]
    return Operation((kind, kind, "pred"), kind, lambda a, b, chosen: np.where(chosen, a, b))


# Conversions


def convert(instruction: Instruction) -> Operation | None:
    """cvt between integers, to floating point, and to shorter floating point to the nearest."""
    *rounding, to, source = instruction.suffixes
    special = SPECIAL_CONVERSIONS.get((to, source, *rounding))
    if special is not None:
        return special
    known = {to, source} <= PLAIN_TYPES | {"s8", "u8"} and set(rounding) <= {"rn"}
    if not known or (source[0] == "f" and to[0] != "f"):
        return None
    dtype = dtype_of(to)
    return Operation((source,), to, lambda value: value.astype(dtype))


def to_bfloat16(x: Array) -> Array:
    """To the nearest, ties to even."""
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(x), np.uint64(0x7FFF), rounded).astype(np.uint16)


def from_bfloat16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_tf32(x: Array) -> Array:
    """19 bits, to the nearest, ties away from zero."""
    bits = x.view(np.uint32)
    rounded = (bits.astype(np.uint64) + np.uint64(0x1000)).astype(np.uint32)
    return np.where(np.isfinite(x), rounded, bits) & np.uint32(0xFFFFE000)


def to_float16(x: Array) -> Array:
    return x.astype(np.float16).view(np.uint16)


def pair(convert_half: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
    def convert_both(upper: Array, lower: Array) -> Array:
        upper, lower = (convert_half(half).astype(np.uint32) for half in (upper, lower))
        return (upper << np.uint32(16)) | lower

    return convert_both


SPECIAL_CONVERSIONS = {
    ("bf16", "f32", "rn"): Operation(("f32",), "b16", to_bfloat16),
    ("f32", "bf16"): Operation(("b16",), "f32", from_bfloat16),
    ("tf32", "f32", "rna"): Operation(("f32",), "b32", to_tf32),
    ("f16x2", "f32", "rn"): Operation(("f32", "f32"), "b32", pair(to_float16)),
    ("bf16x2", "f32", "rn"): Operation(("f32", "f32"), "b32", pair(to_bfloat16)),
}


def extreme(of_integers: Any, of_floats: Any) -> Define:
    """min and max, which prefer a number to a NaN unless `.NaN` is set."""

    def define(instruction: Instruction) -> Operation | None:
        ignores_nan = instruction.suffixes[-1][0] == "f" and "NaN" not in instruction.suffixes
        return same_type(of_floats if ignores_nan else of_integers)(instruction)

    return define


DEFINITIONS: dict[str, Define] = {
    "add": same_type(lambda a, b: a + b),
    "sub": same_type(lambda a, b: a - b),
    "mul": multiply,
    "mad": multiply_and_add,
    "fma": same_type(fused_multiply_add, 3),
    "div": divide,
    "min": extreme(np.minimum, np.fmin),
    "max": extreme(np.maximum, np.fmax),
    "neg": same_type(lambda a: -a, 1),
    "abs": same_type(np.abs, 1),
    "and": same_type(lambda a, b: a & b),
    "or": same_type(lambda a, b: a | b),
    "xor": same_type(lambda a, b: a ^ b),
    "not": same_type(lambda a: ~a, 1),
    # Errors by the PTX ISA: 2 units in the last place for ex2, 2^-23 for sqrt.
    "ex2": approximate(exp2, 2.0**-22),
    "sqrt": approximate(np.sqrt, 2.0**-23),
    "shl": shift,
    "shr": shift,
    "bfe": extract_bits,
    "prmt": lambda instruction: Operation(("b32",) * 3, "b32", permute_bytes),
    "setp": compare,
    "selp": select,
    "cvt": convert,
}
