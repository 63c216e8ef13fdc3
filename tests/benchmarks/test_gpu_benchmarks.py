"""The GPU benchmarks, tried small on the CPU; their oracle and baselines against the reference."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from fusedacl.benchmarks import gpu_angle, gpu_loss, measure
from fusedacl.benchmarks.baselines import (
    dense_supcon,
    foreach_dot_norm,
    supcon_by_log_sum_exp,
    unscale_and_clip_,
)
from fusedacl.kernels import grad_dot_norm, supcon_loss
from torch import Tensor

CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "--device", "cpu", "--quick"])
    monkeypatch.setattr(measure, "MAX_REPEATS", 1)
    # With it the Triton kernels would take part, which takes too long here.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def batch(num_rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(num_rows, 8, requires_grad=True), torch.arange(num_rows) % 5


def reference(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    doubles = embeddings.detach().double().requires_grad_()
    loss = supcon_loss(doubles, labels, denominator="others", impl="reference")
    return loss.detach(), torch.autograd.grad(loss, doubles)[0]


def test_the_oracle_in_blocks_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that do not divide the rows, and one anchor without a positive."""
    embeddings, labels = batch(37)
    labels[3] = 11
    loss, gradient = reference(embeddings, labels)
    for num_pairs, num_checked in ((37 * 5, 9), (2**25, 37), (1, 9)):
        monkeypatch.setattr(gpu_loss, "BLOCK_PAIRS", num_pairs)
        exact = gpu_loss.exact_in_blocks(embeddings.detach(), labels, num_checked)
        torch.testing.assert_close(exact.loss, loss)
        torch.testing.assert_close(exact.gradient, gradient[exact.rows])
        assert len(exact.rows) >= num_checked


def test_a_wrong_gradient_is_seen() -> None:
    embeddings, labels = batch(37)
    exact = gpu_loss.exact_in_blocks(embeddings.detach(), labels)
    loss, gradient = reference(embeddings, labels)
    upstream = torch.tensor(37.0)
    errors = gpu_loss.error_of(loss, gradient * upstream, upstream, exact)
    assert max(errors.values()) < 1e-6
    gradient[5, 2] = torch.nan
    assert gpu_loss.error_of(loss, gradient, upstream, exact)["gradient"] == float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_others_compute_is_the_same_loss(dtype: torch.dtype) -> None:
    embeddings, labels = batch(40)
    rounded = embeddings.detach().to(dtype).requires_grad_()
    loss, gradient = reference(rounded, labels)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2

    def log_sum_exp(y: Tensor) -> Tensor:
        return torch.logsumexp(y.float() @ y.float().T, 1)

    for function in (
        dense_supcon,
        partial(supcon_by_log_sum_exp, log_sum_exp, num_classes=gpu_loss.NUM_CLASSES),
    ):
        value = function(rounded, labels)
        assert value.dtype == torch.float32
        (found,) = torch.autograd.grad(value, rounded, torch.tensor(40.0))
        torch.testing.assert_close(value.detach().double(), loss, rtol=tolerance, atol=0)
        largest = 40 * gradient.abs().max()
        assert (found - 40 * gradient).abs().max() < tolerance * largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_others_do_with_gradients(dtype: torch.dtype) -> None:
    a, b = ([torch.randn(30, 40).to(dtype), torch.randn(7).to(dtype)] for _ in range(2))
    torch.testing.assert_close(foreach_dot_norm(a, b), grad_dot_norm(a, b)[0], rtol=1e-3, atol=0.1)
    norm = torch.cat([x.float().flatten() for x in a]).norm() / 2
    wanted = [x * (0.5 * 3 / (norm + 1e-6)) for x in a]
    unscale_and_clip_(a, torch.full((1,), 0.5), torch.zeros(1), max_norm=3.0)
    for found, exact in zip(a, wanted, strict=True):
        torch.testing.assert_close(found, exact.to(dtype), rtol=1e-2, atol=1e-3)


def test_who_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (16 * 2**30, 16 * 2**30))
    entrants = {
        "ours": gpu_loss.Contestant(dense_supcon),
        "dense": gpu_loss.Contestant(dense_supcon, bytes_per_pair=14),
    }
    fitting, left_out = gpu_loss.fits(entrants, 65536, torch.device("cuda"))
    assert fitting == ["ours"]
    assert left_out == {"dense": "does not fit: about 56 GiB, 16 GiB are free"}


def test_another_s_failure_is_named_and_ours_stops_the_run() -> None:
    def fail() -> tuple[Tensor, Tensor]:
        raise RuntimeError("no kernel image\nand more")

    found, reason = gpu_loss.attempt(fail, must_run=False)
    assert found is None
    assert reason == "failed: RuntimeError: no kernel image"
    with pytest.raises(RuntimeError):
        gpu_loss.attempt(fail, must_run=True)


def test_the_loss_benchmark_runs(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_loss.main()
    printed = capsys.readouterr().out
    assert "M=272 d=16 torch.float16: " in printed
    assert "E=11 N=32 K=2 d=16 torch.float32: " in printed


def test_the_angle_benchmark_runs(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_angle.main()
    assert "one layer, 23 tensors" in capsys.readouterr().out
