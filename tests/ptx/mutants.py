"""Faults in the one-launch kernel's PTX, each of which the machine must notice.

Run by test_kernels.py, in a process where impl="triton" runs on the machine for PTX.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contrastive_cases import check_error, make_inputs
from ptx.driver import Driver
from ptx.memory import OutOfBounds, Race, Uninitialized
from torch import Tensor

BARRIER = r"bar\.sync\s+0;"
Rewrite = Callable[[str], str]


def check() -> None:
    torch.manual_seed(0)
    check_error(make_inputs(33, 5, width=40, dtype=torch.float32), torch.randint(5, (33,)))


def replace(pattern: str, replacement: str, index: int) -> Rewrite:
    """Replaces one occurrence of a pattern, by its number."""

    def rewrite(ptx: str) -> str:
        found = list(re.finditer(pattern, ptx))[index]
        return ptx[: found.start()] + found.expand(replacement) + ptx[found.end() :]

    return rewrite


@pytest.fixture
def mutate(ptx_driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Callable[[Rewrite], None]:
    return lambda rewrite: monkeypatch.setattr(ptx_driver, "rewrite", rewrite)


def test_a_missing_barrier(mutate: Callable[[Rewrite], None]) -> None:
    """5 of 37 may go unnoticed: the compiler puts one before the first use of shared memory too."""
    count: list[int] = []
    mutate(lambda ptx: count.append(len(re.findall(BARRIER, ptx))) or ptx)
    check()
    unnoticed = []
    for index in range(count[0]):
        mutate(replace(BARRIER, "", index))
        try:
            check()
        except (Race, Uninitialized):
            continue
        unnoticed.append(index)
    assert len(unnoticed) <= 0.15 * count[0], f"barriers {unnoticed} of {count[0]}"


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        (r"fma\.rn\.f32 (\s*%r\d+), (%r\d+), (%r\d+), (%r\d+)", r"fma.rn.f32 \1, \2, \4, \3"),
        (r"(shfl\.sync\.bfly\.b32 \s*%r\d+, %r\d+), 16", r"\1, 8"),
        (r"@%p\d+ (ld\.global)", r"\1"),
        (r"ex2\.approx\.ftz\.f32 (\s*%r\d+), %r\d+", r"mov.b32 \1, 0f3F800000"),
    ],
    ids=["operands swapped", "wrong lane", "no guard", "no exponential"],
)
def test_wrong_instructions(
    mutate: Callable[[Rewrite], None], pattern: str, replacement: str
) -> None:
    mutate(replace(pattern, replacement, 0))
    with pytest.raises((AssertionError, OutOfBounds, Race, Uninitialized)):
        check()


def test_a_buffer_one_element_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's notes are the one-dimensional buffer."""
    allocate = Tensor.new_empty

    def allocate_less(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        return tensor[:-1] if tensor.dim() == 1 else tensor

    monkeypatch.setattr(Tensor, "new_empty", allocate_less)
    with pytest.raises(OutOfBounds):
        check()
