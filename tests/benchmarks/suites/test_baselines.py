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
    a, b = gradients(torch.float32)
    b[0] = -b[0]
    by_tensor = torch.cat([each.flatten() for each in baselines.gramian_pcgrad(a, b)])
    torch.testing.assert_close(by_tensor, baselines.stacked_pcgrad(a, b), rtol=1e-4, atol=1e-4)
    # The case's own gradients are left alone.
    assert not any(x.requires_grad or hasattr(x, "jac") for x in (*a, *b))


def test_a_mean_over_all_rows_by_memeff(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the formula of its CLIP loss in place of its kernels, which need a GPU."""

    class Clip:
        def __init__(self, temperature: float, *, normalized_inputs: bool, stable: bool) -> None:
            assert normalized_inputs and not stable
            self.temperature = temperature

        def __call__(self, x: Tensor, y: Tensor) -> Tensor:
            logits = x @ y.T / self.temperature
            everything = logits.logsumexp(0) + logits.logsumexp(1)
            return (everything / 2 - logits.diagonal()).mean()

    monkeypatch.setitem(sys.modules, "memeff", SimpleNamespace(MemoryEfficientCLIPLoss=Clip))
    embeddings, labels = batch(37)
    rows = embeddings.clone().requires_grad_()
    mean = baselines.memeff_mean_log_sum_exp()
    loss = baselines.supcon_by_mean_log_sum_exp(mean, rows, labels, 5)
    wanted = exact(embeddings, labels, ALL)
    gradient = torch.autograd.grad(loss, rows)[0]
    assert exact_loss.error_of(loss, gradient, 1.0, wanted) < 1e-5


def test_sigmoids_by_siglip_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its documented formula in place of its kernels, which need a GPU."""

    def plus(
        rows: Tensor, others: Tensor, log_scale: Tensor, bias: Tensor, of_row: Tensor,
        of_other: Tensor, *, num_groups: int,
    ) -> Tensor:  # fmt: skip
        positive = (of_row[:, None] == of_other).to(rows.dtype)
        weight = torch.where(positive > 0, positive / positive.sum(1, keepdim=True), 1.0)
        logits = rows @ others.T * log_scale.exp() + bias
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, positive, weight)

    monkeypatch.setitem(sys.modules, "siglip_kernel", SimpleNamespace(fused_siglip_plus_loss=plus))
    embeddings, labels = batch(37)
    rows = embeddings.clone().requires_grad_()
    loss = baselines.siglip_plus()(rows, labels, 5, 0.5)
    gradient = torch.autograd.grad(loss, rows)[0]
    for num_pairs in (37 * 5, 2**25):
        monkeypatch.setattr(exact_loss, "BLOCK_PAIRS", num_pairs)
        wanted = exact_loss.sigmoids_in_blocks(embeddings, labels, temperature=0.5, num_trained=30)
        assert wanted.rows.max() == 29
        assert exact_loss.error_of(loss, gradient, 1.0, wanted) < 1e-5


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
