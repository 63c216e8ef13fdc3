"""The tiled loss as a GPU computes it: Triton kernels between the matrix products of a tile."""

import pytest
import torch
from contrastive_cases import (
    DENOMINATORS,
    DEVICE,
    DTYPES,
    KINDS,
    LABELS,
    REDUCTIONS,
    check_error,
    combine,
    make_inputs,
    run,
    use_implementation,
)
from fusedacl.kernels.contrastive.tiled import loss as tiled


@pytest.fixture(autouse=True)
def small_gpu_tiles(monkeypatch: pytest.MonkeyPatch, poison: None) -> None:
    use_implementation(monkeypatch, "tiles on a GPU")


@pytest.mark.parametrize("layout", LABELS)
def test_label_layouts(layout: str) -> None:
    """Any two of dtype, size, kind of inputs, options and temperature; also run as PTX."""
    for dtype, num_samples, kind, denominator, reduction, temperature in combine(
        DTYPES, (1, 2, 49, 61), KINDS, DENOMINATORS, REDUCTIONS, (0.5, 0.05)
    ):
        inputs = make_inputs(num_samples, width=7, dtype=dtype, device=DEVICE, **kind)
        labels = LABELS[layout](num_samples, kind["num_labels"] or 4).to(DEVICE)
        check_error(
            inputs, labels, impl="tiled",
            denominator=denominator, reduction=reduction, temperature=temperature,
        )  # fmt: skip


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_row_weights_of_zero_give_zeros_in_float16(reduction: str) -> None:
    """No positives, or an upstream gradient of zero for one exit or both."""
    inputs = make_inputs(60, exits=2, width=8, dtype=torch.float16, device=DEVICE)
    settings = {"impl": "tiled", "reduction": reduction}
    singletons = torch.arange(60, device=DEVICE)
    assert all((found == 0).all() for found in run(inputs, singletons, None, **settings))
    labels = singletons % 3
    factor = torch.tensor([1.0, 0.0], device=DEVICE)
    for upstream in (factor, 0 * factor):
        if reduction == "none":
            upstream = upstream[:, None].expand(2, 60)
        _, gradient = run(inputs, labels, upstream, **settings)
        assert gradient.isfinite().all()
        assert (gradient[1] == 0).all()


def test_an_ignored_row_beside_tiny_denominators_in_float16() -> None:
    """No denominator contains its exponentials, so its weights leave float16's range."""
    centers = torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]]).repeat(30, 1)
    inputs = {"embeddings": (centers + 0.05 * torch.randn(60, 4)).half().to(DEVICE)}
    labels = torch.arange(60, device=DEVICE) % 2
    labels[7] = -100
    for temperature in (0.1, 0.07, 0.05):
        _, gradient = check_error(
            inputs, labels, impl="tiled", denominator="negatives", temperature=temperature
        )
        assert (gradient[7] == 0).all()


def test_a_rare_class_that_is_the_negative_of_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The float16 sum of one row's weights over whole tiles must not overflow."""
    for name in ("TILE", "GPU_TILE"):
        monkeypatch.setattr(tiled, name, 1024)
    inputs = {"embeddings": torch.randn(1024, 16).half().to(DEVICE)}
    labels = (torch.arange(1024, device=DEVICE) < 2).long()
    for temperature in (0.5, 0.05):
        _, gradient = run(
            inputs, labels, None, impl="tiled", denominator="negatives", temperature=temperature
        )
        assert gradient.isfinite().all()


def test_a_row_close_to_all_others() -> None:
    """Its weights sum to the number of rows: the scaled float16 sum must not overflow."""
    hub = torch.randn(1, 16)
    samples = (hub + 0.01 * torch.randn(100, 16)).half()
    labels = torch.arange(100, device=DEVICE) % 50
    check_error({"embeddings": samples.to(DEVICE)}, labels, impl="tiled", temperature=0.05)
