"""Negatives of all ranks: losses and gradients equal those of one process."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contrastive_cases import DENOMINATORS, LABELS, REDUCTIONS, run
from fusedacl.kernels import acl_loss
from fusedacl.kernels.contrastive import dispatch
from fusedacl.kernels.contrastive.tiled import loss as tiled
from negatives_cases import losses_on_rank, make_case
from rank_pool import Ranks
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

SPLITS = ([5, 5], [1, 8], [3, 2, 4, 1], [4, 0, 1, 6])
KINDS: list[dict[str, Any]] = [
    {"num_labels": None},
    {"num_labels": 3},
    {"num_labels": 3, "teacher": True},
    {"num_labels": 11, "teacher": True, "exits": 2},
    {"num_labels": None, "exits": 3},
]


def losses_in_small_tiles(rank: int, cases: list[tuple[Any, ...]]) -> list[list[Tensor] | None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "TILE", 4)
        patch.setattr(tiled, "FEW_ROWS", 0)
        return losses_on_rank(rank, cases)


def fused_losses_on_rank(rank: int, cases: list[tuple[Any, ...]]) -> list[list[Tensor] | None]:
    from fusedacl.kernels.contrastive.gpu import large_batches, pair_sums, row_steps
    from fusedacl.kernels.contrastive.gpu.tiles import Blocks, Tile

    def small_tiles(capability: int, dtype: torch.dtype, width: int) -> Blocks:
        return Blocks(Tile(32, 16, width, 0, 4, 2), Tile(16, 32, width, width, 4, 2))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "SMALL_ROWS", 0)
        patch.setattr(large_batches, "shipped", small_tiles)
        for module in (pair_sums, row_steps):
            patch.setattr(module, "PADDED_ROWS", 32)
        return losses_on_rank(rank, cases)


def of_all_rows(values: list[Tensor], sizes: list[int], copies: int, combine: Any) -> Tensor:
    """Values [.., M] of one process from those of the ranks' own rows [.., m]."""
    by_copy = [value.unflatten(-1, (copies, -1)) for value in values]
    samples = [value[..., :size] for value, size in zip(by_copy, sizes, strict=True)]
    labels = [value[..., size:] for value, size in zip(by_copy, sizes, strict=True)]
    return torch.cat([*samples, combine(labels)], dim=-1).flatten(-2)


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean(0)


def check(
    results: list[list[Tensor]], case: tuple[Any, ...], *, impl: str, tolerance: float
) -> None:
    """Losses and averaged gradients of the ranks are those of one process with all samples.

    Gradients of samples are those of parameters before them: averaged over ranks, of which one has
    the sample.
    """
    inputs, labels, sizes, upstreams, options = case
    copies = 2 if "teacher_embeddings" in inputs else 1
    losses = [result[0] for result in results]
    if options["reduction"] == "none":
        # The ranks' objective is the mean over ranks of what is made of their losses.
        shares = of_all_rows([u / len(sizes) for u in upstreams], sizes, copies, sum)
        loss = of_all_rows(losses, sizes, copies, lambda labels: labels[0])
    else:
        shares, loss = upstreams[0], losses[0]
        assert all(torch.equal(other, loss) for other in losses)
    exact = {**options, "impl": impl}
    expected = run(inputs, labels, shares, **exact)
    samples = torch.cat([result[1] for result in results], dim=-2) / len(sizes)
    found = [loss, samples]
    if "label_embeddings" in inputs:
        found.append(mean([result[2] for result in results]))
    for wanted, got in zip(expected, found, strict=True):
        assert got.shape == wanted.shape and got.dtype == wanted.dtype
        if wanted.numel():
            allowed = tolerance * max(wanted.double().abs().max().item(), 1e-3)
            error = (got.double() - wanted.double()).abs().max().item()
            assert error <= allowed, f"{sizes} {options}: error {error:.3g}, allowed {allowed:.3g}"


def compare(
    ranks: Ranks,
    cases: list[tuple[Any, ...]],
    *,
    tolerance: float,
    function: Callable[..., Any] = losses_on_rank,
    oracle: str = "reference",
) -> None:
    by_rank = ranks.run(function, cases)
    for index, case in enumerate(cases):
        results = [found[index] for found in by_rank[: len(case[2])]]
        assert all(found[index] is None for found in by_rank[len(case[2]) :])
        check(results, case, impl=oracle, tolerance=tolerance)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_ranks_are_one_process(
    four_ranks: Ranks, impl: str, denominator: str, reduction: str
) -> None:
    """Every kind of loss and layout of labels in float64, on 2 and 4 ranks, also of unequal size.

    Every split with every kind; each combination of options has other layouts with them.
    """
    options = {"denominator": denominator, "reduction": reduction, "impl": impl}
    first = DENOMINATORS.index(denominator) + REDUCTIONS.index(reduction)
    layouts = list(LABELS)
    cases = [
        make_case(sizes, kind, layouts[(first + row + column) % len(layouts)], options)
        for row, sizes in enumerate(SPLITS)
        for column, kind in enumerate(KINDS)
    ]
    compare(four_ranks, cases, tolerance=1e-10)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_in_many_tiles(four_ranks: Ranks, denominator: str, reduction: str) -> None:
    """Own rows that end in the middle of a tile, and class sums by scattering."""
    options = {"denominator": denominator, "reduction": reduction, "impl": "tiled"}
    splits = ([9, 6], [1, 13], [7, 0, 4, 9])
    cases = [
        make_case(list(sizes), kind, layout, options)
        for sizes, kind, layout in itertools.product(splits, KINDS[:4], ("random", "ignored"))
    ]
    compare(four_ranks, cases, tolerance=1e-10, function=losses_in_small_tiles)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_float32_to_rounding(four_ranks: Ranks, reduction: str) -> None:
    """Within 1e-6 of one process in float32, in sizes of training."""
    options = {"reduction": reduction, "impl": "tiled"}
    cases = [
        make_case(sizes, {**kind, "width": 64}, "random", options, torch.float32)
        for sizes in ([48, 48], [32, 32, 32, 1])
        for kind in KINDS[:4]
    ]
    compare(four_ranks, cases, tolerance=1e-6, oracle="tiled")


@pytest.mark.parametrize("impl", ["reference", "tiled"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_samples_are_gathered_exactly(
    four_ranks: Ranks, dtype: torch.dtype, impl: str
) -> None:
    """float32 losses of 16-bit samples do not depend on who holds the samples."""
    options = {"reduction": "mean", "impl": impl}
    cases = [make_case([6, 5], kind, "random", options, dtype) for kind in KINDS[:4]]
    for case in cases:
        for upstream in case[3]:
            upstream.fill_(1)
    by_rank = four_ranks.run(losses_on_rank, cases)
    for index, (inputs, labels, *_) in enumerate(cases):
        loss, *gradients = run(inputs, labels, None, impl=impl)
        for result in by_rank[:2]:
            torch.testing.assert_close(result[index][0], loss, rtol=1e-6, atol=0)
            assert [got.dtype for got in result[index][1:]] == [dtype] * len(gradients)
        samples = torch.cat([result[index][1] for result in by_rank[:2]], dim=-2) / 2
        torch.testing.assert_close(samples, gradients[0], rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_triton_kernels(four_ranks: Ranks, denominator: str, reduction: str) -> None:
    """The fused kernels, which the interpreter runs on the ranks' CPU."""
    options = {"denominator": denominator, "reduction": reduction, "impl": "triton"}
    cases = [
        make_case([9, 6], {"num_labels": 3}, "random", options, torch.float32),
        make_case([4, 3], {"num_labels": 2, "teacher": True, "exits": 2}, "ignored", options,
                  torch.float32),
        make_case([2, 1, 0, 3], {"num_labels": None}, "one class", options, torch.float32),
    ]  # fmt: skip
    doubles = []
    for inputs, labels, sizes, upstreams, chosen in cases:
        doubles.append(
            ({n: t.double() for n, t in inputs.items()}, labels, sizes, upstreams, chosen)
        )
    by_rank = four_ranks.run(fused_losses_on_rank, cases)
    for index, case in enumerate(doubles):
        results = [[t.double() for t in found[index]] for found in by_rank[: len(case[2])]]
        check(results, case, impl="reference", tolerance=3e-6)


def ddp_on_rank(
    rank: int, sizes: list[int], features: Tensor, labels: Tensor, options: dict[str, Any]
) -> dict[str, Tensor]:
    """Gradients after DistributedDataParallel has averaged them."""
    model = DistributedDataParallel(Net())
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    samples, label_embeddings = model(features[own])
    group = distributed.group.WORLD
    acl_loss(samples, labels[own], label_embeddings, process_group=group, **options).backward()
    return {name: p.grad for name, p in model.module.named_parameters() if p.grad is not None}


class Net(nn.Module):
    """Samples from a layer, and a classifier whose weight is the label embeddings."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(5, 6, dtype=torch.float64)
        self.classifier = nn.Linear(6, 3, bias=False, dtype=torch.float64)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        # Not the parameter itself: DDP looks for what the output depends on.
        return self.layer(features).tanh(), self.classifier.weight * 1.0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_data_parallel_training_averages_to_the_one_process_gradient(
    four_ranks: Ranks, reduction: str
) -> None:
    """PyTorch averages the gradients, and batches have unequal sizes."""
    sizes, options = [4, 1, 6, 2], {"reduction": reduction, "temperature": 0.3}
    features, labels = torch.randn(13, 5).double(), torch.randint(3, (13,))
    net = Net()
    samples, label_embeddings = net(features)
    acl_loss(samples, labels, label_embeddings, **options).backward()
    for found in four_ranks.run(ddp_on_rank, sizes, features, labels, options):
        assert found.keys() == dict(net.named_parameters()).keys()
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-10, atol=1e-12)


def test_a_group_of_one_rank_is_no_group(four_ranks: Ranks) -> None:
    case = make_case([7], KINDS[2], "random", {"reduction": "mean", "impl": "auto"})
    compare(four_ranks, [case], tolerance=0.0, oracle="auto")
