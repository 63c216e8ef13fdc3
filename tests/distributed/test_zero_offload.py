"""Masters and moments in host memory: ZeRO 1 to 3 take the steps of the local backend."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

pytest.importorskip("deepspeed")

from rank_pool import Ranks
from test_zero_parity import BUCKETS, RELEASED, check, named
from zero_cases import compare, overflow, resume

ON_HOST = {"offload_optimizer": {"device": "cpu"}}
CASES: list[dict[str, Any]] = [
    {"dtype": "fp32", "accumulation": 1, "zero": ON_HOST},
    {"dtype": "fp32", "accumulation": 2, "clip": 0.5, "groups": True, "zero": ON_HOST},
    {"dtype": "fp16", "accumulation": 2, "clip": 0.5, "zero": ON_HOST},
    {
        "dtype": "bf16",
        "accumulation": 2,
        "learning_rate": 3e-4,
        "max_angle": 89.7,
        "zero": ON_HOST,
    },
]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("case", CASES, ids=named)
def test_same_steps_as_the_local_backend(
    zero_ranks: Ranks, stage: int, case: dict[str, Any]
) -> None:
    results = zero_ranks.run(compare, stage, case)
    check(case, results)
    assert {decision[0] for decision, _ in results[0]["kept"]} == {True, False}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_overflow_skips_and_recovers(zero_ranks: Ranks, stage: int) -> None:
    results = zero_ranks.run(overflow, stage, ON_HOST)
    assert results[0] == results[1]
    for (scale, skip, moved), (following, _, _) in itertools.pairwise(results[0]):
        assert following == (scale / 2 if skip else scale)
        assert moved == 0.0 or not skip
    assert {skip for _, skip, _ in results[0]} == {True, False}
    assert max(moved for _, _, moved in results[0]) > 0.0


@pytest.mark.parametrize(("stage", "dtype"), [(1, "fp16"), (2, "fp32"), (3, "fp16")])
def test_a_resumed_run_ends_with_the_same_bits(zero_ranks: Ranks, stage: int, dtype: str) -> None:
    for made in zero_ranks.run(resume, stage, {"dtype": dtype, "accumulation": 1, "zero": ON_HOST}):
        assert made["error"] == 0.0
        assert made["moved"] > 0.0


@pytest.mark.parametrize("zero", [BUCKETS, RELEASED])
def test_in_parts(zero_ranks: Ranks, zero: dict[str, Any]) -> None:
    stage = 3 if zero is RELEASED else 2
    case = {"dtype": "fp32", "accumulation": 2, "label_rows": True, "zero": zero | ON_HOST}
    check(case, zero_ranks.run(compare, stage, case))
