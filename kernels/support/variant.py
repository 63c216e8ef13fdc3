"""A kernel as it is shipped: the types, constants and warps with which it is compiled.

Every Triton file lists its own with `variants(capability)`; `targets` compiles them all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One compilation of one kernel.

    name: for people, unique in its file: the kernel, then what distinguishes this variant.
    kernel: the `@triton.jit` function.
    types: Triton type of every run-time argument by name ("*fp16", "i32", "fp32", "*i64").
    constants: value of every `tl.constexpr` argument by name.
    divisible_by_16: the run-time arguments which a launch finds divisible by 16 (addresses from
        PyTorch's allocator, padded strides), as Triton's launcher would mark them.
    matrix_unit: this variant is promised to use the matrix unit (mma or wgmma instructions).
    spills_because: None, or why this variant is shipped although it spills registers, with the
        measurement that says so.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    divisible_by_16: frozenset[str] = frozenset()
    matrix_unit: bool = False
    spills_because: str | None = None
