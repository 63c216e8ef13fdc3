"""Oracles for the tests of the gradient check on a GPU or in Triton's interpreter."""

from typing import Any

import torch
from contrastive_cases import DEVICE
from fusedacl.kernels import gated_combine_, grad_dot_norm
from torch import Tensor

List = list[Tensor | None]


def copies(gradients: List, dtype: torch.dtype | None = None) -> List:
    """Copy a list; copies have the same strides unless these leave gaps."""
    return [None if t is None else t.to(dtype or t.dtype, copy=True) for t in gradients]


def fused(a: List, b: List, groups: list[int] | None = None) -> Tensor:
    return grad_dot_norm(a, b, groups=groups, impl="triton")


def check_sums(a: List, b: List, groups: list[int] | None = None) -> Tensor:
    """Check the sums against float64, within float32 rounding relative to |a| |b|."""
    double = torch.float64
    wanted = grad_dot_norm(copies(a, double), copies(b, double), groups=groups, impl="reference")
    found = fused(a, b, groups)
    assert found.shape == wanted.shape and found.dtype == torch.float32
    wanted = wanted.double()
    size = torch.stack([(wanted[:, 1] * wanted[:, 2]).sqrt(), wanted[:, 1], wanted[:, 2]], dim=1)
    assert torch.all((found.double() - wanted).abs() <= 4e-7 * size)
    return found


def check_combination(a: List, b: List, stats: Tensor | None = None, **options: Any) -> Tensor:
    """Check every element, within one rounding of its dtype and of float32 arithmetic.

    Triton's interpreter truncates to bfloat16 instead of rounding.
    """
    groups = options.get("groups")
    if stats is None:
        stats = fused(a, b, groups)
    options = {"weight": 0.3, "max_angle": 180.0, **options}
    double = torch.float64
    exact, exact_b, found = copies(a, double), copies(b, double), copies(a)
    for index, (original, copy) in enumerate(zip(a, found, strict=True)):
        if original is not None and copy is not None and copy.stride() != original.stride():
            found[index] = same_gaps(original)
    wanted_used = gated_combine_(exact, exact_b, stats, impl="reference", **options)
    used = gated_combine_(found, b, stats, impl="triton", **options)
    torch.testing.assert_close(used, wanted_used, rtol=0, atol=0, equal_nan=True)
    for got, wanted, x, y in zip(found, exact, a, b, strict=True):
        if got is None or wanted is None or x is None:
            assert got is None
            continue
        size = x.double().abs() + (0 if y is None else y.double().abs())
        ulps = 1.01 if x.dtype == torch.bfloat16 and DEVICE == "cpu" else 0.51
        tolerance = ulps * torch.finfo(x.dtype).eps * wanted.abs() + 5e-7 * size
        tolerance += torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
        error = (got.double() - wanted).abs()
        untouched = (got == x) | (got.isnan() & x.isnan())
        assert torch.all((error <= tolerance) | (untouched & wanted_used.isnan().any()))
    return used


def same_gaps(tensor: Tensor) -> Tensor:
    """Copy a tensor with the same strides, also where they leave gaps."""
    base = tensor.new_empty(tensor.untyped_storage().size() // tensor.element_size())
    view = base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return view.copy_(tensor)
