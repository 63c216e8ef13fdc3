"""Dropout as a module: its probability, its scale, and what repeats with the seed."""

import pytest
import torch
from fusedacl.engine.runtime.dropout import Dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_zeroes_and_scales(dtype: torch.dtype) -> None:
    dropout = Dropout(0.3)
    x = torch.full((7, 111, 129), 2.0, dtype=dtype, requires_grad=True)
    y = dropout(x)
    zeroed = y == 0
    assert y.dtype == dtype
    # Rounded to 2^-16, and the scale with it.
    torch.testing.assert_close(y[~zeroed], torch.full_like(y[~zeroed], 2 / 0.7))
    # The share among 100,233 draws is within five standard deviations, in each of the four places.
    for part in (zeroed.flatten()[place::4] for place in range(4)):
        share = float(part.double().mean())
        assert abs(share - 0.3) < 5 * (0.3 * 0.7 / part.numel()) ** 0.5
    # Neighbours that share a random number are independent: both zeroed in 9 % of the pairs.
    both = float((zeroed.flatten()[0:-1:4] & zeroed.flatten()[1::4]).double().mean())
    assert abs(both - 0.09) < 5 * (0.09 * 0.91 / (x.numel() / 4)) ** 0.5
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient == 0, zeroed)
    assert torch.equal(gradient[~zeroed] * 2, y[~zeroed])


def test_dropout_repeats_with_the_seed_and_knows_its_ends() -> None:
    x = torch.ones(5, 3)
    torch.manual_seed(7)
    first = Dropout(0.5)(x)
    torch.manual_seed(7)
    assert torch.equal(Dropout(0.5)(x), first)
    assert torch.equal(Dropout(0.0)(x), x)
    assert torch.equal(Dropout(1.0)(x), torch.zeros_like(x))
    assert torch.equal(Dropout(0.5).eval()(x), x)
