"""Baselines compute what their names say: held against the reference, in blocks, by formula."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from fusedacl.benchmarks.suites import baselines
from fusedacl.benchmarks.suites.loss import exact as exact_loss
from fusedacl.benchmarks.suites.loss.exact import ALL, OTHERS, OTHERS_ALL_ROWS, exact_in_blocks
from fusedacl.kernels import grad_dot_norm, supcon_loss
from torch import Tensor

exact = partial(exact_in_blocks, temperature=0.5)


def batch(num_rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(num_rows, 8), torch.arange(num_rows) % 5


def reference(embeddings: Tensor, labels: Tensor, denominator: str) -> tuple[Tensor, Tensor]:
    doubles = embeddings.detach().double().requires_grad_()
    loss = supcon_loss(doubles, labels, denominator=denominator, impl="reference")
    return loss.detach(), torch.autograd.grad(loss, doubles)[0]


@pytest.mark.parametrize(("formula", "denominator"), [(OTHERS, "others"), (ALL, "all")])
def test_the_oracle_in_blocks_is_the_reference(
    formula: str, denominator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that do not divide the rows, and one anchor without a positive."""
    embeddings, labels = batch(37)
    labels[3] = 11
    loss, gradient = reference(embeddings, labels, denominator)
    for num_pairs, num_checked in ((37 * 5, 9), (2**25, 37), (1, 9)):
        monkeypatch.setattr(exact_loss, "BLOCK_PAIRS", num_pairs)
        found = exact(embeddings, labels, formula, num_checked=num_checked)
        torch.testing.assert_close(found.loss, loss)
        torch.testing.assert_close(found.gradient, gradient[found.rows])
        assert len(found.rows) >= num_checked


def test_a_mean_over_all_rows_counts_lonely_anchors() -> None:
    embeddings, labels = batch(20)
    labels[3] = 11
    few, all_rows = (exact(embeddings, labels, each) for each in (OTHERS, OTHERS_ALL_ROWS))
    torch.testing.assert_close(all_rows.loss, few.loss * 19 / 20)
    torch.testing.assert_close(all_rows.gradient, few.gradient * 19 / 20)


def test_a_wrong_gradient_is_seen() -> None:
    embeddings, labels = batch(37)
    wanted = exact(embeddings, labels, OTHERS)
    loss, gradient = reference(embeddings, labels, "others")
    assert exact_loss.error_of(loss, gradient * 37, 37.0, wanted) < 1e-6
    gradient[5, 2] = torch.nan
    assert exact_loss.error_of(loss, gradient, 37.0, wanted) == float("inf")


def log_sum_exp(y: Tensor) -> Tensor:
    return torch.logsumexp(y.float() @ y.float().T, 1)


in_blocks = partial(baselines.checkpointed_supcon, temperature=0.5, block_rows=16)


def normalised_supcontrast(embeddings: Tensor, labels: Tensor) -> Tensor:
    return baselines.supcontrast(torch.nn.functional.normalize(embeddings, dim=1)[:, None], labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("function", "denominator"),
    [
        (baselines.dense_supcon, "others"),
        (partial(baselines.dense_supcon, denominator="all"), "all"),
        (partial(baselines.supcon_by_log_sum_exp, log_sum_exp, num_classes=16), "others"),
        (normalised_supcontrast, "others"),
        (partial(in_blocks, denominator="others"), "others"),
        (partial(in_blocks, denominator="all"), "all"),
    ],
)
def test_what_others_compute_is_the_same_loss(
    function: Callable[[Tensor, Tensor], Tensor], denominator: str, dtype: torch.dtype
) -> None:
    embeddings, labels = batch(40)
    rounded = embeddings.to(dtype).requires_grad_()
    loss, gradient = reference(rounded, labels, denominator)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    value = function(rounded, labels)
    (found,) = torch.autograd.grad(value, rounded, torch.tensor(40.0, dtype=value.dtype))
    torch.testing.assert_close(value.detach().double(), loss, rtol=tolerance, atol=0)
    largest = 40 * gradient.abs().max()
    assert (found - 40 * gradient).abs().max() < tolerance * largest


def test_two_views_of_supcontrast_are_rows_with_the_same_label() -> None:
    features = torch.nn.functional.normalize(torch.randn(9, 2, 6), dim=-1)
    labels = torch.arange(9) % 3
    rows = torch.cat(torch.unbind(features, dim=1))
    expected = baselines.dense_supcon(rows, labels.repeat(2))
    torch.testing.assert_close(baselines.supcontrast(features, labels), expected, rtol=1e-5, atol=0)


def gradients(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    a = [torch.randn(30, 40).to(dtype), torch.randn(7).to(dtype)]
    return a, [(torch.randn_like(x) + 0.2 * x).to(dtype) for x in a]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sums_unscaling_and_clipping(dtype: torch.dtype) -> None:
    a, b = gradients(dtype)
    for function in (baselines.foreach_dot_norm, baselines.looped_dot_norm):
        torch.testing.assert_close(function(a, b), grad_dot_norm(a, b)[0], rtol=1e-3, atol=0.1)
    norm = torch.cat([x.float().flatten() for x in a]).norm() / 2
    wanted = [(x * (0.5 * 3 / (norm + 1e-6))).to(dtype) for x in a]
    baselines.unscale_and_clip_(a, torch.full((1,), 0.5), torch.zeros(1), max_norm=3.0)
    torch.testing.assert_close(a, wanted, rtol=1e-2, atol=1e-3)


def test_gates_combine_and_clip() -> None:
    a, b = gradients(torch.float32)
    wanted = [0.9 * x + 0.1 * y for x, y in zip(a, b, strict=True)]
    norm = torch.cat([x.flatten() for x in wanted]).norm()
    ours, theirs = ([x.clone() for x in a] for _ in range(2))
    baselines.foreach_gate_(ours, b, 0.1, torch.ones(1), max_norm=2.0)
    baselines.concatenated_gate_(theirs, b, 0.1, 90.0, max_norm=2.0)
    for found in (ours, theirs):
        torch.testing.assert_close(found, [x * 2 / norm for x in wanted])
    # Beyond the largest angle the gate leaves the second gradient out.
    opposite = [-x for x in a]
    baselines.concatenated_gate_(a, opposite, 0.1, 90.0, max_norm=1e9)
    torch.testing.assert_close(a[0], -opposite[0])


def test_pcgrad_projects_gradients_that_conflict() -> None:
    pytest.importorskip("torchjd", reason="torchjd is not installed (extra `bench`)")
    a, b = [torch.tensor([1.0, 0.0])], [torch.tensor([-1.0, 1.0])]
    torch.testing.assert_close(baselines.stacked_pcgrad(a, b), torch.tensor([0.5, 1.5]))


def test_apex_s_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its calls, with stand-ins for the compiled modules that only a GPU has."""

    def applier(function: str, overflow: Tensor, lists: list[list[Tensor]], each: bool) -> object:
        assert function == "l2norm" and overflow.dtype == torch.int and not each
        return torch.cat([x.flatten() for x in lists[0]]).norm().reshape(1), None

    for name, values in (
        ("amp_C", {"multi_tensor_l2norm": "l2norm"}),
        ("apex", {}),
        ("apex.multi_tensor_apply", {"multi_tensor_applier": applier}),
    ):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**values))
    a, b = gradients(torch.float32)
    found, expected = baselines.apex_dot_norm(a, b), grad_dot_norm(a, b)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-2)
