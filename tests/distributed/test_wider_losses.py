"""Wider losses of the samples and memories of all ranks: those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contrastive_cases import combine
from rank_pool import Ranks
from wider_cases import LABELS, TEMPERATURES, differentiate, loss_of, make_problem
from wider_cases_on_ranks import wider_on_rank

SPLITS = ([6, 6], [1, 11], [3, 2, 6, 1], [4, 0, 7, 1])
KINDS: list[dict[str, Any]] = [
    {"label_embeddings": False},
    {"memory": 12, "class_weights": True},
    {"teacher": True, "mask": True},
    {"exits": 3, "memory": 4},
    {"label_embeddings": False, "memory": 8},
]


@pytest.mark.parametrize("name", ["reference", "tiled", "tiled by PyTorch", "fused"])
def test_ranks_are_one_process(four_ranks: Ranks, name: str) -> None:
    """In float64, but for the kernels; averaged gradients are those of the whole batch."""
    is_fused = name == "fused"
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if is_fused else {}
    problems = []
    for sizes, kind, labels, temperature, denominator, reduction, positives in combine(
        SPLITS, KINDS, LABELS, (None,) if is_fused else TEMPERATURES,
        ("all", "others") if is_fused else ("all", "others", "negatives"),
        ("mean", "sum", "none"), ("overlap", "each"),
    ):  # fmt: skip
        if labels == "soft":
            positives = "overlap"
        options = {"denominator": denominator, "reduction": reduction, "positives": positives}
        problems.append((make_problem(12, labels, temperature, **kind, **options), sizes))
    by_rank = four_ranks.run(wider_on_rank, problems, name)
    for index, (problem, sizes) in enumerate(problems):
        found = [results[index] for results in by_rank[: len(sizes)]]
        whole = problem | {"impl": "reference"}
        if problem["reduction"] == "none":
            whole["reduction"] = "sum"
        expected = differentiate(
            lambda **arguments: loss_of(arguments)(**arguments).sum(), whole, torch.float64
        )
        if problem["reduction"] != "none":
            for result in found:
                loss = result["loss"].double()
                torch.testing.assert_close(loss, expected["loss"], **tolerance)
        for key, wanted in expected.items():
            if key == "loss":
                continue
            parts = [result[key] for result in found]
            by_sample = parts[0].shape != wanted.shape or key == "embeddings"
            if by_sample:
                rows = -2 if key == "embeddings" else -1
                got = torch.cat(parts, dim=rows) / len(sizes)
            else:
                got = torch.stack(parts).mean(0)
            torch.testing.assert_close(got.double(), wanted, **tolerance)


@pytest.mark.parametrize("name", ["reference", "tiled"])
def test_exits_and_samples_of_equal_number_and_one_small_temperature(
    two_ranks: Ranks, name: str
) -> None:
    """Temperatures by sample stay so where all ranks' samples are as many as exits; ranks compute
    in one dtype although one of them alone has a temperature that needs float64."""
    by_sample = torch.tensor([0.005, 0.3, 0.4, 0.5])
    problem = make_problem(4, label_embeddings=False, exits=4) | {"temperature": by_sample[None]}
    split = [(problem | {"reduction": "mean"}, [2, 2])]
    by_rank = two_ranks.run(wider_on_rank, split, name)
    whole = problem | {"impl": "reference"}
    expected = differentiate(
        lambda **arguments: loss_of(arguments)(**arguments).sum(), whole, torch.float64
    )
    for results in by_rank:
        torch.testing.assert_close(results[0]["loss"], expected["loss"])


def test_ranks_must_agree(two_ranks: Ranks) -> None:
    problems = [
        (make_problem(6, memory=4), [3, 3]),
        (make_problem(6, "several"), [3, 3]),
    ]
    with pytest.raises(AssertionError, match=r"differ in labels \(int64 on rank 0; bool x 4"):
        two_ranks.run(of_other_kinds, problems)


def of_other_kinds(rank: int, problems: list[Any]) -> None:
    """Each rank computes another problem."""
    wider_on_rank(rank, problems[rank : rank + 1], "tiled")


@pytest.mark.parametrize("name", ["reference", "tiled"])
def test_no_samples_beside_memories(two_ranks: Ranks, name: str) -> None:
    problem = make_problem(0, memory=8) | {"reduction": "sum"}
    found = two_ranks.run(wider_on_rank, [(problem, [0, 0])], name)
    expected = differentiate(
        lambda **arguments: loss_of(arguments)(**arguments).sum(), problem, torch.float64
    )
    for results in found:
        torch.testing.assert_close(results[0], expected)
