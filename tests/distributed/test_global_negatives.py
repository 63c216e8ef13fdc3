"""Negatives of all ranks: losses and gradients equal those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contrastive_cases import DENOMINATORS, LABELS, REDUCTIONS, run
from negatives_cases import losses_on_rank, make_case
from rank_pool import Ranks
from torch import Tensor

SPLITS = ([5, 5], [1, 8], [9, 6], [3, 2, 4, 1], [4, 0, 1, 6])
KINDS: list[dict[str, Any]] = [
    {"num_labels": None},
    {"num_labels": 3},
    {"num_labels": 3, "teacher": True},
    {"num_labels": 11, "teacher": True, "exits": 2},
    {"num_labels": None, "exits": 3},
]


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
    name: str = "",
    oracle: str = "reference",
) -> None:
    by_rank = ranks.run(losses_on_rank, cases, name)
    for index, case in enumerate(cases):
        results = [found[index] for found in by_rank[: len(case[2])]]
        assert all(found[index] is None for found in by_rank[len(case[2]) :])
        check(results, case, impl=oracle, tolerance=tolerance)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("name", ["reference", "tiled", "tiles of 4 rows"])
def test_ranks_are_one_process(
    four_ranks: Ranks, name: str, denominator: str, reduction: str
) -> None:
    """Every kind of loss and layout of labels in float64, on 2 and 4 ranks, also of unequal size.

    Every split with every kind; each combination of options has other layouts with them. Own rows
    may end in the middle of a tile.
    """
    impl = "tiled" if name == "tiles of 4 rows" else name
    options = {"denominator": denominator, "reduction": reduction, "impl": impl}
    first = DENOMINATORS.index(denominator) + REDUCTIONS.index(reduction)
    layouts = list(LABELS)
    cases = [
        make_case(list(sizes), kind, layouts[(first + row + column) % len(layouts)], options)
        for row, sizes in enumerate(SPLITS)
        for column, kind in enumerate(KINDS)
    ]
    compare(four_ranks, cases, tolerance=1e-10, name=name)


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


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_loop_for_many_rows(four_ranks: Ranks, reduction: str) -> None:
    """Own rows that end in the middle of a tile, and columns of other ranks behind them."""
    denominator = DENOMINATORS[REDUCTIONS.index(reduction)]
    options = {"denominator": denominator, "reduction": reduction, "impl": "tiled"}
    cases = [
        make_case(sizes, {**kind, "width": 40}, "ignored", options, torch.float32)
        for sizes in ([100, 150], [96, 1, 0, 130])
        for kind in KINDS
    ]
    by_rank = four_ranks.run(losses_on_rank, cases, "triangle")
    for index, (inputs, labels, sizes, *rest) in enumerate(cases):
        results = [[t.double() for t in found[index]] for found in by_rank[: len(sizes)]]
        doubles = {name: tensor.double() for name, tensor in inputs.items()}
        check(results, (doubles, labels, sizes, *rest), impl="reference", tolerance=3e-6)


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
    by_rank = four_ranks.run(losses_on_rank, cases, "fused")
    for index, (inputs, labels, sizes, *rest) in enumerate(cases):
        results = [[t.double() for t in found[index]] for found in by_rank[: len(sizes)]]
        doubles = {name: tensor.double() for name, tensor in inputs.items()}
        check(results, (doubles, labels, sizes, *rest), impl="reference", tolerance=3e-6)


def test_a_group_of_one_rank_is_no_group(four_ranks: Ranks) -> None:
    case = make_case([7], KINDS[2], "random", {"reduction": "mean", "impl": "auto"})
    compare(four_ranks, [case], tolerance=0.0, oracle="auto")
