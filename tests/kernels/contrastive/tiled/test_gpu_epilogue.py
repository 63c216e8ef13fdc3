"""The tiled loss as a GPU computes it: Triton kernels between the matrix products of a tile."""

import pytest
import torch
from contrastive_cases import DEVICE, REDUCTIONS, check_error, make_inputs, run, use_implementation
from fusedacl.kernels.contrastive.tiled import loss as tiled


@pytest.fixture(autouse=True)
def small_gpu_tiles(monkeypatch: pytest.MonkeyPatch, poison: None) -> None:
    use_implementation(monkeypatch, "tiles on a GPU")


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


def test_loss_scale_does_not_overflow_in_float16() -> None:
    inputs = make_inputs(60, 3, width=16, dtype=torch.float16, device=DEVICE)
    labels = torch.randint(3, (60,), device=DEVICE)
    for reduction in ("mean", "none"):
        upstream = torch.full((63,) if reduction == "none" else (), 2.0**15, device=DEVICE)
        upstream = upstream / 63 if reduction == "none" else upstream
        check_error(inputs, labels, upstream, impl="tiled", reduction=reduction)


def test_a_row_close_to_all_others() -> None:
    """Its weights sum to the number of rows: the scaled float16 sum must not overflow."""
    hub = torch.randn(1, 16)
    samples = (hub + 0.01 * torch.randn(100, 16)).half()
    labels = torch.arange(100, device=DEVICE) % 50
    check_error({"embeddings": samples.to(DEVICE)}, labels, impl="tiled", temperature=0.05)
