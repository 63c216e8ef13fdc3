"""The compiled gradient check at the sizes of real models."""

import pytest
import torch
from fusedacl.benchmarks.measuring.clock import launches
from fusedacl.benchmarks.suites.gate.case import bert_shapes
from fusedacl.kernels import gated_combine_, grad_dot_norm
from torch import Tensor

DEVICE = torch.device("cuda")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def make_lists(dtype: torch.dtype, other: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    shapes = bert_shapes(num_layers=2)
    a = [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]
    b = [(torch.randn_like(x) + 0.1 * x).to(other) for x in a]
    return a, b


@pytest.mark.parametrize("other", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(dtype: torch.dtype, other: torch.dtype) -> None:
    a, b = make_lists(dtype, other)
    groups = [index % 3 for index in range(len(a))]
    doubles = [[x.double() for x in gradients] for gradients in (a, b)]
    stats = grad_dot_norm(a, b, groups=groups, impl="triton")
    wanted = grad_dot_norm(*doubles, groups=groups, impl="reference")
    torch.testing.assert_close(stats, wanted, rtol=1e-6, atol=1e-2)
    scale = torch.tensor(0.25, device=DEVICE)
    options = {"weight": 0.3, "scale": scale, "max_norm": 10.0, "groups": groups}
    used = gated_combine_(a, b, stats, impl="triton", **options)
    expected = gated_combine_(*doubles, stats, impl="reference", **options)
    assert torch.equal(used, expected)
    tolerance = 2 * torch.finfo(dtype).eps
    for found, exact in zip(a, doubles[0], strict=True):
        # The absolute tolerance is for results that underflow in float16.
        torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=1e-7)


def test_twice_the_same_bits() -> None:
    a, b = make_lists(torch.float16, torch.float32)
    first, second = (grad_dot_norm(a, b) for _ in range(2))
    assert torch.equal(first, second)


def test_a_billion_elements_lose_nothing() -> None:
    """Accumulation in float64: a float32 sum of ones stops at 2^24."""
    free, _ = torch.cuda.mem_get_info()
    if free < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    ones = torch.ones(2**30 + 4097, dtype=torch.float16, device=DEVICE)
    stats = grad_dot_norm([ones], [ones], impl="triton")
    assert stats.tolist() == [[float(torch.tensor(2.0**30 + 4097))] * 3]


def test_what_is_not_finite_is_reported_and_not_written() -> None:
    a, b = make_lists(torch.float16, torch.float16)
    a[5].view(-1)[-1] = torch.inf
    before = [x.clone() for x in a]
    stats = grad_dot_norm(a, b)
    assert not stats.isfinite().all()
    used = gated_combine_(a, b, stats, weight=0.3, max_norm=1.0)
    assert used.isnan().all()
    assert all(torch.equal(x, old) for x, old in zip(a, before, strict=True))


def test_launches_do_not_depend_on_the_number_of_tensors() -> None:
    a, b = make_lists(torch.float16, torch.float16)
    stats = grad_dot_norm(a, b)
    for call, most in (
        (lambda: grad_dot_norm(a, b), 2),
        (lambda: gated_combine_(a, b, stats, weight=0.3, scale=0.5, max_norm=1.0), 1),
    ):
        names = launches(call, DEVICE)
        if names is None:
            pytest.skip("the profiler may not look at this GPU")
        assert len(names) <= most, names
