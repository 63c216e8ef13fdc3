"""Results with the quick interpreter beside those with Triton's own."""

import pytest
import torch
from contrastive_cases import DEVICE, DTYPES, make_inputs, run, use_implementation
from fusedacl.kernels import grad_dot_norm
from torch import Tensor

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU nothing is interpreted")


def results(impl: str, dtype: torch.dtype) -> list[Tensor]:
    """Loss and gradients of a batch; dot product and norms of two halves of a gradient."""
    torch.manual_seed(3)
    inputs = make_inputs(21, 5, width=70, exits=2, dtype=dtype)
    labels = torch.arange(21) % 4
    labels[::6] = -100
    found = run(inputs, labels, None, impl=impl, temperature=0.1)
    halves = [[half.contiguous()] for half in found[1].chunk(2)]
    return [*found, grad_dot_norm(*halves, impl="triton")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["small", "fused"])
def test_same_bits(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    from quick_interpreter import REPLACEMENTS

    impl = use_implementation(monkeypatch, name)
    assert all(getattr(owner, name) is quick for owner, name, _, quick in REPLACEMENTS)
    found = results(impl, dtype)
    for owner, attribute, stock, _ in REPLACEMENTS:
        monkeypatch.setattr(owner, attribute, stock)
    for ours, stocks in zip(found, results(impl, dtype), strict=True):
        assert torch.equal(ours, stocks)
        assert stocks.ne(0).any()
