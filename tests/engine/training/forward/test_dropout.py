"""Dropout on a CPU: the probability, the factor, the gradient, and what is left to PyTorch."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from fusedacl.engine import MultiExitForSequenceClassification
from fusedacl.engine.model.encoder import checkpoint_layers
from fusedacl.engine.training.forward.dropout import FastDropout, fast_dropout, runs_again
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_probability_factor_and_gradient(p: float) -> None:
    x = torch.ones(999, 1001, requires_grad=True)
    with FastDropout():
        y = functional.dropout(x, p)
    kept = y != 0
    # Six standard deviations.
    assert abs(kept.float().mean() - (1 - p)) < 6 * math.sqrt(p * (1 - p) / x.numel())
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)), rtol=2e-4, atol=0)
    # The mean of many is exact, for the factor belongs to the rounded probability.
    assert abs(y.mean() - 1) < 6 * math.sqrt(p / (1 - p) / x.numel())
    y.backward(torch.full_like(y, 2.0))
    assert x.grad is not None and torch.equal(x.grad, 2 * y.detach())


def test_elements_are_independent_of_their_neighbours() -> None:
    """Four of them share a number: no two places of a number, nor numbers in a row, agree."""
    with FastDropout():
        kept = (functional.dropout(torch.ones(400_000), 0.5) != 0).double() - 0.5
    for distance in range(1, 9):
        together = (kept[:-distance] * kept[distance:]).mean() * 4
        assert abs(together) < 6 / math.sqrt(kept.numel())


def test_numbers_are_those_of_the_default_generator() -> None:
    def draw(threads: int) -> torch.Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        torch.manual_seed(3)
        with FastDropout():
            found = functional.dropout(torch.ones(70_001), 0.3)
        torch.set_num_threads(before)
        return found

    first = draw(1)
    assert torch.equal(first, draw(4))
    assert not torch.equal(first, functional.dropout(torch.ones(70_001), 0.3))


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (2, 3, 7)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    with FastDropout():
        # Some layouts: the mask is one of its own.
        y = functional.dropout(torch.ones(shape).mT if len(shape) > 1 else torch.ones(shape), 0.5)
    assert y.shape == (torch.ones(shape).mT if len(shape) > 1 else torch.ones(shape)).shape
    assert set(y.flatten().tolist()) <= {0.0, 2.0}


def test_what_is_left_to_pytorch() -> None:
    x = torch.ones(8)
    with FastDropout():
        assert functional.dropout(x, 0.0) is not None
        assert torch.equal(functional.dropout(x, 0.5, training=False), x)
        assert torch.equal(functional.dropout(x, 1.0), torch.zeros(8))
        in_place = torch.ones(8)
        assert functional.dropout(in_place, 0.5, inplace=True) is in_place
        with pytest.raises(ValueError, match="probability"):
            functional.dropout(x, 1.5)


def test_where_it_is_used(exit_model: MultiExitForSequenceClassification) -> None:
    cpu = torch.device("cpu")
    assert isinstance(fast_dropout(cpu, compiled=False), FastDropout)
    assert not isinstance(fast_dropout(cpu, compiled=True), FastDropout)
    assert not isinstance(fast_dropout(torch.device("cuda"), compiled=False), FastDropout)
    assert not runs_again(exit_model)
    checkpoint_layers(exit_model.backbone)
    assert runs_again(exit_model)
    assert runs_again(nn.Sequential(checkpoint_wrapper(nn.Dropout())))


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_without_what_is_dropped(mask: str | None, scale: float | None) -> None:
    """With a probability below 2**-17 nothing is dropped, and the results are PyTorch's."""
    query, key, value = (torch.randn(2, 3, 5, 4, dtype=torch.float32) for _ in range(3))
    seen = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    seen[0, :, :, 3:] = False
    masks = {
        None: None, "bool": seen, "float": torch.zeros(2, 1, 5, 5).masked_fill(~seen, -torch.inf),
    }  # fmt: skip
    options = {"attn_mask": masks[mask], "scale": scale}
    wanted = functional.scaled_dot_product_attention(query, key, value, **options)
    with FastDropout():
        found = functional.scaled_dot_product_attention(
            query, key, value, dropout_p=1e-9, **options
        )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    if mask == "bool":
        seen[1] = False
        with FastDropout():
            found = functional.scaled_dot_product_attention(
                query, key, value, dropout_p=0.5, **options
            )
        # A query without any key.
        assert torch.equal(found[1], torch.zeros_like(found[1])) and found.isfinite().all()


def test_attention_drops_weights() -> None:
    """The values are a unit matrix, so that the results are the weights themselves."""
    query, key = torch.randn(2, 1, 40, 30, 8)
    value = torch.eye(30).expand(1, 40, 30, 30)
    with FastDropout():
        found = functional.scaled_dot_product_attention(query, key, value, dropout_p=0.25)
    weights = (query @ key.mT / math.sqrt(8)).softmax(-1)
    kept = found != 0
    torch.testing.assert_close(found[kept], weights[kept] / 0.75, rtol=1e-5, atol=1e-7)
    assert abs(kept.float().mean() - 0.75) < 0.02


@pytest.mark.parametrize("autocast", [True, False])
def test_attention_in_bfloat16(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are near those of float64, and the same weights as in float32 are dropped."""
    # Also where such products are emulated, slowly.
    monkeypatch.setattr("fusedacl.engine.training.forward.dropout.computes", lambda dtype: True)
    inputs = [torch.randn(2, 3, 40, 8).bfloat16() for _ in range(3)]
    seen = torch.ones(2, 1, 40, 40, dtype=torch.bool)
    seen[0, :, :, 30:] = False

    def results(p: float, dtype: torch.dtype) -> list[torch.Tensor]:
        q, k, v = (x.to(dtype, copy=True).requires_grad_() for x in inputs)
        y = functional.scaled_dot_product_attention(q, k, v, seen, dropout_p=p)
        y.backward(torch.ones_like(y) * torch.arange(8))
        return [y.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]

    context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with FastDropout(), context:
        found = results(1e-9, torch.float32 if autocast else torch.bfloat16)
    assert found[0].dtype == torch.bfloat16
    for mine, exact in zip(found, results(0.0, torch.float64), strict=True):
        assert (mine.double() - exact).norm() < 0.01 * exact.norm()
    with FastDropout(), context:
        torch.manual_seed(1)
        weights = functional.scaled_dot_product_attention(
            *inputs[:2], torch.eye(40).expand(2, 3, 40, 40).bfloat16(), dropout_p=0.25
        )
    with FastDropout():
        torch.manual_seed(1)
        wanted = functional.scaled_dot_product_attention(
            *(x.float() for x in inputs[:2]), torch.eye(40).expand(2, 3, 40, 40), dropout_p=0.25
        )
    assert torch.equal(weights != 0, wanted != 0)
    torch.testing.assert_close(weights.float(), wanted, rtol=0.05, atol=0)


def test_autocast_leaves_float64() -> None:
    inputs = torch.randn(3, 2, 3, 40, 8, dtype=torch.float64)
    with FastDropout(), torch.autocast("cpu", torch.bfloat16):
        found = functional.scaled_dot_product_attention(*inputs, dropout_p=0.5)
    assert found.dtype == torch.float64


def test_attention_without_arithmetic_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's attention remains, whose products are in float32."""
    monkeypatch.setattr("fusedacl.engine.training.forward.dropout.computes", lambda dtype: False)
    inputs = torch.randn(3, 2, 3, 40, 8).bfloat16()
    torch.manual_seed(1)
    wanted = functional.scaled_dot_product_attention(*inputs, dropout_p=0.5)
    torch.manual_seed(1)
    with FastDropout():
        found = functional.scaled_dot_product_attention(*inputs, dropout_p=0.5)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("again", [FastDropout, nullcontext])
def test_a_pass_that_runs_again(again: Any) -> None:
    """It has the same mask in the same context, and another one without."""
    x = torch.ones(64, requires_grad=True)
    with FastDropout():
        y = checkpoint(
            lambda x: functional.dropout(x, 0.5) * x, x, use_reentrant=False,
            context_fn=lambda: (nullcontext(), again()),
        )  # fmt: skip
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad != 0, y != 0) == (again is FastDropout)
