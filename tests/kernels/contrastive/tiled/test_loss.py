"""The tiled implementation against the reference, in float64 and within its float32 rounding."""

from typing import Any

import pytest
import torch
from contrastive_cases import (
    DENOMINATORS,
    KINDS,
    LABELS,
    REDUCTIONS,
    Inputs,
    combine,
    make_inputs,
    run,
    set_tile,
)
from torch import Tensor


def compare(inputs: Inputs, labels: Tensor, **options: Any) -> None:
    upstream = torch.randn_like(run(inputs, labels, None, impl="reference", **options)[0])
    expected = run(inputs, labels, upstream, impl="reference", **options)
    found = run(inputs, labels, upstream, impl="tiled", **options)
    for wanted, got in zip(expected, found, strict=True):
        # The dtypes are compared as well.
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("tile", [4, 512])
def test_equals_the_reference(monkeypatch: pytest.MonkeyPatch, poison: None, tile: int) -> None:
    """Any three of label layout, exits, kind of inputs, denominator and reduction."""
    set_tile(monkeypatch, tile)
    for layout, exits, kind, denominator, reduction in combine(
        list(LABELS), (None, 3), KINDS, DENOMINATORS, REDUCTIONS, strength=3
    ):
        inputs = make_inputs(7, exits=exits, **kind)
        labels = LABELS[layout](7, kind["num_labels"] or 3)
        inputs["embeddings"][..., 2, :] = 0
        inputs["embeddings"][..., labels == -100, :] = torch.nan
        compare(inputs, labels, denominator=denominator, reduction=reduction)


@pytest.mark.parametrize("temperature", [0.015, 0.002, 0.0002])
def test_tiny_temperatures(temperature: float) -> None:
    """float32 down to 1 / 70, float64 down to 1 / 690, below that the reference."""
    inputs = make_inputs(9, 3, dtype=torch.float32)
    labels = torch.arange(9) % 3
    doubles = {name: tensor.double() for name, tensor in inputs.items()}
    exact = run(doubles, labels, None, temperature=temperature, impl="reference")
    found = run(inputs, labels, None, temperature=temperature)
    for wanted, got in zip(exact, found, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-3 / temperature * 1e-2)
    if temperature < 1 / 690:
        with pytest.raises(ValueError, match="temperature 0.0002 is below 1 / 690.*reference"):
            run(inputs, labels, None, temperature=temperature, impl="tiled")
