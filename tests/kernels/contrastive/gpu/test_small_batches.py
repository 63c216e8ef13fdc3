"""The one-launch kernel against the float64 reference, within twice eager PyTorch's error."""

import itertools
from typing import Any

import pytest
import torch
from contrastive_cases import (
    DENOMINATORS,
    DEVICE,
    DTYPES,
    REDUCTIONS,
    check_error,
    make_inputs,
    run,
    use_implementation,
)
from fusedacl.kernels.contrastive import dispatch
from fusedacl.kernels.contrastive.dispatch import Workload
from fusedacl.kernels.support import machine
from torch import Tensor

pytest.importorskip("triton")
from fusedacl.kernels.contrastive.gpu import small_batches


@pytest.fixture(autouse=True)
def small_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "SMALL_ROWS", 256)


def inputs_of(num_samples: int, num_labels: int | None = None, **kind: Any) -> dict[str, Tensor]:
    return make_inputs(num_samples, num_labels, device=DEVICE, **{"dtype": torch.float32} | kind)


@pytest.mark.parametrize("dtype", DTYPES)
def test_width_one(dtype: torch.dtype) -> None:
    """Directions are signs, so every gradient is 0 up to the rounding of terms of size 1."""
    inputs = {"embeddings": torch.tensor([[1.0], [-3], [2], [0], [-1]], device=DEVICE).to(dtype)}
    labels = torch.tensor([0, 0, 1, 1, 0], device=DEVICE)
    expected, _ = run(inputs, labels, None, impl="reference")
    loss, gradient = run(inputs, labels, None, impl="triton")
    torch.testing.assert_close(loss, expected)
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("name", ["small", "fused"])
def test_opposite_rows_at_the_lowest_temperature(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """D is near 1e-38: its inverse times the upstream gradient leaves float32's range."""
    use_implementation(monkeypatch, name)
    reason = dispatch.obstacle(f"supcon_{name}", Workload(torch.device(DEVICE)))
    if reason is not None:
        pytest.skip(reason)
    rows = torch.tensor([[1.0, 0], [1, 0.001], [-1, 0.001], [-1, 0]], device=DEVICE)
    labels = torch.tensor([0, 0, 1, 1], device=DEVICE)
    upstream = torch.full((4,), 65536.0, device=DEVICE)
    for denominator in DENOMINATORS:
        options: dict[str, Any] = {
            "temperature": 0.023, "denominator": denominator, "reduction": "none",
        }  # fmt: skip
        exact = run({"embeddings": rows.double()}, labels, upstream, impl="reference", **options)
        found = run({"embeddings": rows}, labels, upstream, impl="triton", **options)
        # Terms of size upstream / temperature cancel.
        for wanted, got, size in zip(exact, found, (1 / 0.023, 65536 / 0.023), strict=True):
            torch.testing.assert_close(got.double(), wanted.double(), rtol=1e-5, atol=1e-6 * size)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has the capability it has")
@pytest.mark.parametrize("capability", [70, 75])
def test_without_a_matrix_unit(monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
    """Use the chunks and precisions of older GPUs."""
    monkeypatch.setattr(machine, "capability", lambda device: capability)
    constants = small_batches.machine_constants(capability, torch.float16)
    assert constants["COSINE_PRECISION"] == constants["GRADIENT_PRECISION"] == "ieee"
    inputs = inputs_of(17, 3, width=70, teacher=True, dtype=torch.float16)
    check_error(inputs, torch.randint(3, (17,), device=DEVICE))


def test_exits_in_the_middle() -> None:
    """The exits of one forward pass may be [N, E, d] in memory, viewed as [E, N, d]."""
    inputs = inputs_of(5, 2, exits=3)
    inputs["embeddings"] = torch.randn(5, 3, 6, device=DEVICE).transpose(0, 1)
    check_error(inputs, torch.arange(5, device=DEVICE) % 2)


def test_ignored_label_of_a_class() -> None:
    """ignore_index 1 removes the samples of class 1 and keeps its label embedding."""
    for teacher in (False, True):
        inputs = inputs_of(7, 3, teacher=teacher)
        labels = torch.arange(7, device=DEVICE) % 3
        for denominator in DENOMINATORS:
            check_error(inputs, labels, denominator=denominator, ignore_index=1)


def test_no_exits() -> None:
    for num_samples, reduction in itertools.product((0, 5), REDUCTIONS):
        labels = torch.zeros(num_samples, dtype=torch.int64, device=DEVICE)
        check_error(inputs_of(num_samples, 3, exits=0), labels, reduction=reduction)


@pytest.mark.parametrize("length", [1e-10, 1e-6, 1e6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lengths_do_not_matter(length: float, dtype: torch.dtype) -> None:
    inputs = inputs_of(6, 2, width=16, dtype=dtype)
    inputs["embeddings"] *= length
    check_error(inputs, torch.arange(6, device=DEVICE) % 2)


def test_zero_vectors() -> None:
    """A vector no longer than 1e-12 has no direction: its own gradient is 0 too."""
    inputs = inputs_of(6, 2)
    inputs["embeddings"][1] = 0
    inputs["embeddings"][2] *= 1e-14
    _, gradient, _ = check_error(inputs, torch.arange(6, device=DEVICE) % 2)
    assert (gradient[1:3] == 0).all()
    assert (gradient[3] != 0).any()


def test_nan_stays_in_its_exit_and_out_of_ignored_rows() -> None:
    inputs = inputs_of(9, exits=3)
    inputs["embeddings"][1, 4] = torch.nan
    labels = torch.arange(9, device=DEVICE) % 3
    labels[5] = -100
    loss, gradient = run(inputs, labels, None, impl="triton")
    assert loss.isnan().tolist() == [False, True, False]
    assert gradient.isnan().flatten(1).any(1).tolist() == [False, True, False]
    assert gradient[1, 4].isnan().all()
    assert (gradient[:, 5] == 0).all()


def test_nan_upstream_of_a_row_that_does_not_count() -> None:
    inputs = inputs_of(5)
    labels = torch.tensor([0, 0, 1, -100, 0], device=DEVICE)
    upstream = torch.tensor([1.0, 2, torch.nan, torch.nan, 3], device=DEVICE)
    check_error(inputs, labels, upstream, reduction="none")
