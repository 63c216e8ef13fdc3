import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fusedacl.kernels import (
    angle_degrees,
    combined_squared_norm,
    gated_combine_,
    grad_dot_norm,
    gradients,
)
from torch import Tensor

IMPLS = ("reference", "tiled")
NAN, INF = math.nan, math.inf
List = list[Tensor | None]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks and a last one that is not full."""
    monkeypatch.setattr(gradients, "CHUNK_PER_THREAD", 16)


def make_lists(dtype: torch.dtype = torch.float32) -> tuple[List, List]:
    shapes = ((5, 7), (16,), (33,), (), (0,), (3, 4), (2,))
    a: List = [torch.randn(shape).to(dtype) for shape in shapes]
    b: List = [torch.randn(shape).to(dtype) for shape in shapes]
    a[0], b[5] = torch.randn(7, 5).to(dtype).t(), torch.randn(4, 3).to(dtype).t()
    a[6] = b[1] = None
    return a, b


def expected_stats(a: List, b: List, groups: list[int]) -> Tensor:
    stats = torch.zeros(max(groups) + 1, 3, dtype=torch.float64)
    for left, right, group in zip(a, b, groups, strict=True):
        x, y = ([] if t is None else t.double().flatten().tolist() for t in (left, right))
        dot = math.fsum(p * q for p, q in zip(x, y, strict=False))
        stats[group] += torch.tensor(
            [dot, math.fsum(p * p for p in x), math.fsum(q * q for q in y)], dtype=torch.float64
        )
    return stats


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("impl", IMPLS)
def test_sums(impl: str, dtype: torch.dtype) -> None:
    a, b = make_lists(dtype)
    for groups in (None, [0, 1, 3, 0, 1, 3, 0]):
        stats = grad_dot_norm(a, b, groups=groups, impl=impl)
        assert stats.dtype == torch.float32
        expected = expected_stats(a, b, groups or [0] * len(a))
        torch.testing.assert_close(stats.double(), expected, rtol=1e-6, atol=1e-5)


def test_sums_of_mixed_dtypes() -> None:
    a: List = [torch.randn(20).half(), torch.randn(20).double()]
    b: List = [torch.randn(20), torch.randn(20).bfloat16()]
    expected = expected_stats(a, b, [0, 0])
    for impl in IMPLS:
        torch.testing.assert_close(
            grad_dot_norm(a, b, impl=impl).double(), expected, rtol=1e-6, atol=1e-5
        )


def test_many_elements_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum of 2^24 ones and more is where one float32 accumulator stops counting."""
    monkeypatch.setattr(gradients, "CHUNK_PER_THREAD", 128 * 1024)
    ones = torch.ones(2**24 + 3000)
    assert grad_dot_norm([ones], [ones]).tolist() == [[float(torch.tensor(2.0**24 + 3000))] * 3]


def test_twice_the_same_bits() -> None:
    a, b = make_lists()
    assert torch.equal(grad_dot_norm(a, b), grad_dot_norm(a, b))


def test_angle() -> None:
    x = torch.tensor([1.0, 0.0])
    cases = {
        0.0: x, 45.0: torch.tensor([1.0, 1.0]), 90.0: torch.tensor([0.0, 3.0]), 180.0: -2 * x,
    }  # fmt: skip
    for degrees, y in cases.items():
        angle = angle_degrees(grad_dot_norm([x], [y]))
        torch.testing.assert_close(angle, torch.tensor([degrees]), rtol=0, atol=1e-5)
    assert angle_degrees(grad_dot_norm([x], [torch.zeros(2)])).tolist() == [90]
    assert angle_degrees(grad_dot_norm([x], [None])).tolist() == [90]
    # Rounding may leave a cosine above 1.
    assert angle_degrees(torch.tensor([[1.0001, 1.0, 1.0]])).tolist() == [0]
    for bad in (NAN, INF):
        assert angle_degrees(grad_dot_norm([torch.tensor([1.0, bad])], [x])).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("scale", [None, 0.25, torch.tensor(0.25)], ids=["none", "float", "tensor"])
def test_combination(
    scale: float | Tensor | None, weight: float, impl: str, dtype: torch.dtype
) -> None:
    a, b = make_lists(dtype)
    b[6] = None  # nothing to write to
    before = [None if x is None else x.clone() for x in a]
    stats = grad_dot_norm(a, b)
    used = gated_combine_(a, b, stats, weight=weight, max_angle=180, scale=scale, impl=impl)
    assert used.tolist() == [torch.tensor(weight).item()]
    factor = 1.0 if scale is None else 0.25
    for x, old, y in zip(a, before, b, strict=True):
        if x is None or old is None:
            continue
        other = torch.zeros_like(old) if y is None else y
        wanted = factor * ((1 - weight) * old.double() + weight * other.double())
        tolerance = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(x.double(), wanted, rtol=tolerance, atol=tolerance)
        assert x.stride() == old.stride() or not old.is_contiguous()


@pytest.mark.parametrize("impl", IMPLS)
def test_gate_per_group(impl: str) -> None:
    """Kept, dropped, zero gradient, overflow: each group takes its own decision."""
    x = torch.tensor([1.0, 0.0])
    a: List = [x.clone(), x.clone(), x.clone(), torch.tensor([1.0, INF])]
    b: List = [torch.tensor([1.0, 1.0]), torch.tensor([-1.0, 1.0]), torch.zeros(2), x.clone()]
    groups = [0, 1, 2, 3]
    stats = grad_dot_norm(a, b, groups=groups)
    used = gated_combine_(a, b, stats, weight=0.5, scale=2.0, groups=groups, impl=impl)
    assert used[:3].tolist() == [0.5, 0.0, 0.5]
    assert used[3].isnan()
    combined = [tensor.tolist() for tensor in a if tensor is not None]
    assert combined == [[2, 1], [2, 0], [1, 0], [1, INF]]


def test_threshold_is_inclusive_and_can_be_below_90() -> None:
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    stats = grad_dot_norm([x], [y])
    for max_angle, weight in ((90.0, 0.5), (89.9, 0.0)):
        assert gated_combine_([x.clone()], [y], stats, weight=0.5, max_angle=max_angle) == weight
    stats = grad_dot_norm([x], [None])
    assert gated_combine_([x.clone()], [None], stats, weight=0.5, max_angle=60) == 0


def test_norm_of_the_combination_needs_no_pass() -> None:
    a, b = make_lists()
    groups = [0, 1, 1, 0, 1, 0, 0]
    b[6] = None
    stats = grad_dot_norm(a, b, groups=groups)
    used = gated_combine_(a, b, stats, weight=0.3, max_angle=180, groups=groups)
    after = grad_dot_norm(a, a, groups=groups)[:, 1]
    torch.testing.assert_close(combined_squared_norm(stats, used), after)
    assert combined_squared_norm(stats, torch.tensor([0.3, NAN])).isnan().tolist() == [False, True]


def test_all_entries_may_be_none() -> None:
    assert grad_dot_norm([None], [None]).tolist() == [[0, 0, 0]]


X = torch.ones(3)
STATS = torch.ones(1, 3)
Call = Callable[[], Tensor]


def sums(*arguments: Any, **options: Any) -> Call:
    return lambda: grad_dot_norm(*arguments, **options)


def combine(a: Any = None, b: Any = None, stats: Tensor = STATS, **options: Any) -> Call:
    arguments = ([X.clone()] if a is None else a, [X] if b is None else b, stats)
    return lambda: gated_combine_(*arguments, **{"weight": 0.5, **options})


SPARSE = torch.ones(3).to_sparse()
BAD: dict[str, tuple[type[Exception], Call]] = {
    "a has 1 entries and b 2": (ValueError, sums([X], [X, X])),
    "a and b are empty": (ValueError, sums([], [])),
    r"a\[0\] has shape \(3,\) and b\[0\] \(2,\)": (ValueError, sums([X], [X[:2]])),
    r"b\[0\] is on meta and a\[0\] on cpu": (ValueError, sums([X], [X.to("meta")])),
    r"a\[0\] is sparse .*to_dense": (TypeError, sums([SPARSE], [X])),
    r"b\[0\] is torch.int64": (TypeError, sums([X], [X.long()])),
    r"a\[0\] must be a torch.Tensor or None, not list": (TypeError, sums([[1.0]], [X])),
    "groups has 2 entries and a 1": (ValueError, sums([X], [X], groups=[0, 1])),
    r"groups is \[-1\]: every entry must be an int >= 0": (ValueError, sums([X], [X], groups=[-1])),
    "impl is 'tield': .*did you mean 'tiled'": (ValueError, sums([X], [X], impl="tield")),
    "impl='triton' cannot run": (ValueError, sums([X], [X], impl="triton")),
    "impl='tiled' cannot run: it is for the CPU": (
        ValueError,
        sums([X.to("meta")], [X.to("meta")], impl="tiled"),
    ),
    r"stats has shape \(2, 3\): 1 group": (ValueError, combine(stats=torch.ones(2, 3))),
    r"weight is 1.5: it must lie in \[0, 1\]": (ValueError, combine(weight=1.5)),
    r"max_angle is 200: it must lie in \[0, 180\]": (ValueError, combine(max_angle=200)),
    r"a\[0\] is None but b\[0\] is not": (ValueError, combine(a=[None])),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message: str) -> None:
    error, call = BAD[message]
    with pytest.raises(error, match=message):
        call()
