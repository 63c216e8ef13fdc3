"""The kernels as PTX; any two values of different options of the losses meet in some case.

Run by test_kernels.py, in a process where impl="triton" runs on the machine for PTX.
PTX_GRID_STEP=4 takes every fourth case.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from contrastive_cases import DENOMINATORS, LABELS, REDUCTIONS, check_error, make_inputs
from fusedacl.kernels import gated_combine_, grad_dot_norm
from fusedacl.kernels.contrastive import dispatch
from fusedacl.kernels.support import machine

HAS_MATRIX_UNIT = machine.capability(torch.device("cpu")) >= 80

STEP = int(os.environ.get("PTX_GRID_STEP", "1"))
DTYPES = list(itertools.product([torch.float16, torch.float32], repeat=2))
OPTIONS: dict[str, Sequence[Any]] = {
    "labels": tuple(LABELS),
    "shape": ((1, 2), (7, 33), (17, 6), (33, 16)),
    "kind": (
        {"num_labels": None},
        {"num_labels": 3},
        {"num_labels": 3, "exits": 2},
        {"num_labels": 3, "teacher": True},
    ),
    "dtype": (torch.float16, torch.bfloat16, torch.float32),
    "denominator": DENOMINATORS,
    "reduction": REDUCTIONS,
    "temperature": (0.5, 0.05, 0.023),
}


def pairwise(options: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Cases in which each value of an option meets each value of every other one.

    Each case takes, option by option, the value that meets most of those chosen for the first time.
    """
    names = list(options)
    left = {
        frozenset([(one, i), (other, j)])
        for one, other in itertools.combinations(names, 2)
        for i, j in itertools.product(range(len(options[one])), range(len(options[other])))
    }
    while left:
        case = dict(min(sorted(pair) for pair in left))
        for name in names:
            if name not in case:
                case[name] = max(
                    range(len(options[name])),
                    key=lambda value: sum(
                        frozenset([(name, value), chosen]) in left for chosen in case.items()
                    ),
                )
        left -= {frozenset(pair) for pair in itertools.combinations(case.items(), 2)}
        yield {name: options[name][case[name]] for name in names}


@pytest.mark.parametrize("case", list(pairwise(OPTIONS))[::STEP])
def test_error_is_that_of_eager_pytorch(
    monkeypatch: pytest.MonkeyPatch, case: dict[str, Any]
) -> None:
    """supcon_small, and supcon_fused where there is a matrix unit."""
    if HAS_MATRIX_UNIT:
        monkeypatch.setattr(dispatch, "SMALL_ROWS", 0)
    (num_samples, width), num_labels = case["shape"], case["kind"]["num_labels"]
    inputs = make_inputs(num_samples, width=width, dtype=case["dtype"], **case["kind"])
    labels = LABELS[case["labels"]](num_samples, num_labels or 3)
    check_error(
        inputs, labels,
        denominator=case["denominator"], reduction=case["reduction"],
        temperature=case["temperature"],
    )  # fmt: skip


@pytest.mark.skipif(HAS_MATRIX_UNIT, reason="the kernels of the gradients do not use it")
@pytest.mark.parametrize("dtype, other", DTYPES[::STEP])
def test_gradients_in_the_shipped_blocks(dtype: torch.dtype, other: torch.dtype) -> None:
    """Whole and partial blocks, aligned and not, and another order of the same elements."""
    a, b = ([torch.randn(size).to(kind) for size in (5000, 1, 0, 35)] for kind in (dtype, other))
    a[0] = torch.randn(5001).to(dtype)[1:]
    a.append(torch.randn(4096).to(dtype))
    b.append(torch.randn(64, 64).to(other).t().flatten())
    a[3], b[3] = a[3].view(7, 5), b[3].view(5, 7).t()
    doubles = [[tensor.double() for tensor in tensors] for tensors in (a, b)]
    groups = [0, 1, 1, 2, 0]
    stats = grad_dot_norm(a, b, groups=groups, impl="triton")
    exact = grad_dot_norm(*doubles, groups=groups, impl="reference")
    torch.testing.assert_close(stats, exact, rtol=1e-5, atol=1e-3)
    options: dict[str, Any] = {"weight": 0.3, "scale": 0.5, "max_norm": 1.0, "groups": groups}
    used = gated_combine_(a, b, stats, max_angle=180.0, impl="triton", **options)
    assert used.tolist() == [torch.tensor(0.3).item()] * 3
    gated_combine_(*doubles, stats, max_angle=180.0, impl="reference", **options)
    for found, wanted in zip(a, doubles[0], strict=True):
        rounding = torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), wanted, rtol=rounding, atol=1e-6)
