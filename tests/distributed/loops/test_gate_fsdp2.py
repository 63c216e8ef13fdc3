"""The gate under FSDP2 and DistributedDataParallel, as on the batches of all ranks."""

from __future__ import annotations

from typing import Any

import pytest
from loop_cases import (
    Step,
    by_hand,
    collectives,
    groups_on_two_meshes,
    refusals,
    skipped_by_a_scaler,
    steps,
)
from rank_pool import Ranks

ALWAYS = {"max_angle": 180.0}
LATE = {"accumulation": 2, "late": True}
CASES: list[tuple[int, dict[str, Any]]] = [
    (1, {"reshard": True}),
    (2, {"reshard": True, "max_norm": 0.05}),
    (4, {"reshard": True}),
    (4, {"reshard": False, "accumulation": 2}),
    (4, {"reshard": True, **LATE, "max_norm": 0.05}),
    (2, {"layers": False, **LATE}),
    (4, {"reshard": True, "hybrid": True}),
    (4, {"reshard": False, "hybrid": True, "accumulation": 2, "late_all_reduce": True}),
    (1, {"ddp": True}),
    (2, {"ddp": True, "accumulation": 2}),
    (4, {"ddp": True, "max_norm": 0.05}),
    *(
        (4, {way: True, "reshard": True, "reentrant": kind})
        for way in ("ddp", "fsdp")
        for kind in (True, False)
    ),
]
BF16: list[dict[str, Any]] = [
    {"reshard": True, "bf16": True},
    {"reshard": False, "bf16": True, **LATE},
    {"layers": False, "bf16": True, "accumulation": 2},
]


def compare(of_ranks: list[list[Step]], expected: list[Step], rel: float, degrees: float) -> None:
    for made in of_ranks:
        for found, wanted, first in zip(made, expected, of_ranks[0], strict=True):
            assert (found.angle, found.kept) == (first.angle, first.kept)
            assert found.kept == wanted.kept
            assert found.angle == pytest.approx(wanted.angle, abs=degrees)
            assert found.grad_norm == pytest.approx(wanted.grad_norm, rel=max(rel, 1e-5))
            for left, right in zip(found.gradients, wanted.gradients, strict=True):
                error = (left.double() - right).norm()
                assert error <= rel * max(float(right.norm()), 0.01)


@pytest.mark.parametrize(("ranks", "options"), CASES)
def test_same_steps_as_on_the_whole_batch(
    four_ranks: Ranks, ranks: int, options: dict[str, Any]
) -> None:
    # So that the gate does both in these steps.
    options = options | {"max_angle": by_hand(ranks, options | ALWAYS)[0].angle + 0.4}
    expected = by_hand(ranks, options)
    assert {step.kept for step in expected} == {True, False}
    compare(four_ranks.run(steps, ranks, options), expected, 1e-7, 1e-4)


@pytest.mark.parametrize("options", BF16)
def test_mixed_precision(four_ranks: Ranks, options: dict[str, Any]) -> None:
    options = options | ALWAYS
    compare(four_ranks.run(steps, 4, options), by_hand(4, options), 0.05, 1.0)


def test_groups_on_two_meshes(four_ranks: Ranks) -> None:
    for found, wanted in four_ranks.run(groups_on_two_meshes):
        assert len(found) == 3
        assert found == pytest.approx(wanted, abs=1e-4)


SHARDED = {"allreduce": 1, "reduce_scatter_base": 2}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"ddp": True}, {"allreduce": 3}),
        ({"ddp": True, "accumulation": 2}, {"allreduce": 3}),
        ({"layers": False}, SHARDED | {"allgather_base": 1}),
        ({"layers": False, **LATE}, SHARDED | {"allgather_base": 2}),
        # The auxiliary loss reaches all four sharded parts, the main loss three.
        ({"reshard": False}, {"allreduce": 1, "reduce_scatter_base": 7, "allgather_base": 4}),
        ({"reshard": True}, {"allreduce": 1, "reduce_scatter_base": 7, "allgather_base": 9}),
    ],
)
def test_collectives_of_a_step(
    four_ranks: Ranks, options: dict[str, Any], expected: dict[str, int]
) -> None:
    assert four_ranks.run(collectives, options | ALWAYS) == [expected] * 4


@pytest.mark.parametrize("options", [{"ddp": True}, {"reshard": True}])
def test_a_scaler_skips_an_overflow_of_one_loss_on_one_rank(
    four_ranks: Ranks, options: dict[str, Any]
) -> None:
    for made in four_ranks.run(skipped_by_a_scaler, options | ALWAYS):
        finite, scales, moved = zip(*made, strict=True)
        assert finite == (True, False, True)
        assert scales == (4.0, 2.0, 2.0)
        assert moved[0] > 0.0 and moved[1] == 0.0 and moved[2] > 0.0


def test_what_is_refused(four_ranks: Ranks) -> None:
    for said in four_ranks.run(refusals):
        words = (
            "is not, whose gradient nobody would average",
            "fully_shard has gathered some for a forward pass",
            "that the gate does not have",
            "process_group: the parameters are sharded",
            "scope: with sharded parameters",
            "set_requires_gradient_sync(True) before the last micro-batch",
            "that the gate does not have",
            "Use torch.distributed.fsdp.fully_shard (FSDP2)",
            "Use torch.distributed.fsdp.fully_shard (FSDP2)",
        )
        assert len(said) == len(words)
        for found, wanted in zip(said, words, strict=True):
            assert wanted in found
