"""A shipped compilation of a kernel: its types, constants and number of warps.

Every Triton file lists its own with `variants(capability)`; `targets` compiles them all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One compilation of one kernel.

    name: shown in tables, unique in its file: the kernel, then what distinguishes the variant.
    types: Triton type of every run-time argument by name ("*fp16", "i32", "fp32", "*i64").
    constants: value of every `tl.constexpr` argument by name.
    divisible_by_16: the run-time arguments that are divisible by 16 in every launch (addresses from
        PyTorch's allocator, padded strides), as Triton's launcher would mark them.
    matrix_unit: whether the variant must use the matrix unit (mma or wgmma instructions).
    spills_because: None, or the measurement for which the variant is shipped although it spills.
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


def make_variant(
    name: str,
    kernel: Any,
    constants: Mapping[str, Any],
    types: Mapping[str, str],
    **settings: Any,
) -> Variant:
    """Return a variant whose addresses are all divisible by 16.

    types: Triton types of the arguments that are not i32; names of other kernels are ignored.
    """
    names = [name for name in kernel.arg_names if name not in constants]
    own = {name: types.get(name, "i32") for name in names}
    addresses = frozenset(name for name in names if own[name].startswith("*"))
    return Variant(name, kernel, own, constants, **{"divisible_by_16": addresses} | settings)
