"""The compiled gradient check at the sizes of real models."""

import pytest
import torch
from contrastive_cases import DTYPES
from fusedacl.benchmarks.measuring.clock import launches
from fusedacl.benchmarks.suites.gate.case import bert_shapes
from fusedacl.kernels import gated_combine_, grad_dot_norm
from gradient_cases import check_combination
from torch import Tensor

DEVICE = torch.device("cuda")


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
    assert torch.equal(stats, grad_dot_norm(a, b, groups=groups, impl="triton"))
    scale = torch.tensor(0.25, device=DEVICE)
    check_combination(a, b, stats, max_angle=90.0, scale=scale, max_norm=10.0, groups=groups)


def test_a_billion_elements_lose_nothing() -> None:
    """Accumulation in float64: a float32 sum of ones stops at 2^24."""
    free, _ = torch.cuda.mem_get_info()
    if free < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    ones = torch.ones(2**30 + 4097, dtype=torch.float16, device=DEVICE)
    stats = grad_dot_norm([ones], [ones], impl="triton")
    assert stats.tolist() == [[float(torch.tensor(2.0**30 + 4097))] * 3]


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
