"""A scope under ZeRO 0 to 3, on two ranks: the local backend's decisions and steps on all texts."""

from __future__ import annotations

import pytest

pytest.importorskip("deepspeed")

from rank_pool import Ranks
from scope_cases import compare_scope, overflow_scope, refuse_agreement
from zero_cases import check_reports

# Between the angles of the steps, by degrees from each.
MAX_ANGLE = {
    "mha": {"top:1": 75.0, "top:2": 75.0, "head": 77.0},
    "linear": {"head": 85.0, "top:2": 77.0},
}
# Bounds as in test_zero_parity: relative error of the weights' change; error of the angle, degrees.
BARS = {"fp32": (3e-6, 1e-3), "fp16": (1e-2, 0.3)}


@pytest.mark.parametrize(
    ("stage", "scope", "dtype", "exit_head"),
    [
        (0, "top:1", "fp32", "mha"),
        (0, "head", "fp16", "linear"),
        (1, "top:1", "fp16", "mha"),
        (1, "head", "fp32", "mha"),
        (2, "top:2", "fp32", "linear"),
        (2, "head", "fp16", "mha"),
        (3, "top:2", "fp16", "mha"),
        (3, "head", "fp32", "linear"),
    ],
)
def test_same_steps_as_the_local_backend(
    zero_ranks: Ranks, stage: int, scope: str, dtype: str, exit_head: str
) -> None:
    results = zero_ranks.run(
        compare_scope, stage, scope, MAX_ANGLE[exit_head][scope], dtype, exit_head
    )
    assert results[0] == results[1]
    made = results[0]
    check_reports(made, *BARS[dtype])
    # The gate did both in this run.
    assert {found[0] for found, _ in made["kept"]} == {True, False}


@pytest.mark.parametrize("stage", [1, 3])
def test_an_overflow_of_one_rank_skips_the_step_on_all(zero_ranks: Ranks, stage: int) -> None:
    for made in zero_ranks.run(overflow_scope, stage):
        scales, skipped, moved = zip(*made, strict=True)
        assert skipped == (True, False, False) and scales == (4096.0, 2048.0, 2048.0)
        # The first step that is taken has the learning rate 0.
        assert [change > 0 for change in moved] == [False, False, True]


def test_the_exact_decision_is_not_to_be_had(zero_ranks: Ranks) -> None:
    for message in zero_ranks.run(refuse_agreement):
        assert "gate_agreement_steps=3: under DeepSpeed there is no exact decision" in message
