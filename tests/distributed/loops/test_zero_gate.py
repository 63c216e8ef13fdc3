"""`ZeroGate` in a loop of one's own takes the steps of `GradientGate` on the whole batch."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("deepspeed")

from rank_pool import Ranks
from zero_gate_cases import STEPS, compare_gate, overflow_of_one_loss, refusals

STAGES = [0, 1, 2, 3]
# Bounds of the relative error of the weights' change and of the angle's, in degrees.
BARS = {"fp32": (1e-6, 1e-3), "fp16": (1e-2, 0.1), "bf16": (5e-2, 0.5)}
CASES: list[dict[str, Any]] = [
    {"dtype": "fp32", "accumulation": 2, "clip": 0.5},
    {"dtype": "fp32", "accumulation": 1, "clip": 0.0, "groups": True},
    # The scale grows at every second step.
    {"dtype": "fp16", "accumulation": 1, "clip": 0.5,
     "precision": {"loss_scale_window": 1, "initial_scale_power": 8}},
    {"dtype": "fp16", "accumulation": 2, "clip": 0.0, "precision": {"loss_scale": 64}},
    {"dtype": "bf16", "accumulation": 1, "clip": 0.0},
]  # fmt: skip
ON_HOST = {"offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("stage", "case"),
    [
        *((stage, case) for stage in STAGES for case in CASES),
        *((stage, CASES[0] | {"zero": ON_HOST}) for stage in (2, 3)),
        *((stage, CASES[0] | {"reentrant": False}) for stage in STAGES),
    ],
    ids=str,
)
def test_same_steps_as_on_one_process(zero_ranks: Ranks, stage: int, case: dict[str, Any]) -> None:
    results = zero_ranks.run(compare_gate, stage, case)
    assert results[0] == results[1]
    made = results[0]
    bar, degrees = BARS[case["dtype"]]
    assert made["error"] <= bar
    assert made["unmoved"] == 0.0
    assert made["steps"] == (STEPS, STEPS * case["accumulation"])
    for found, wanted in made["angle"]:
        assert found == pytest.approx(wanted, abs=degrees)
    for found, wanted in made["grad_norm"]:
        assert found == pytest.approx(wanted, rel=max(2 * bar, 1e-5))
    for found, wanted in [*made["kept"], *made["finite"]]:
        assert found == wanted
    kept = {kept for found, _ in made["kept"] for kept in found}
    assert kept == ({True, False} if case["dtype"] == "fp32" else {True})
    if case.get("precision", {}).get("loss_scale_window"):
        assert made["scales"][-1] > made["scales"][0]


@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_of_one_loss_on_one_rank_skips_the_step(zero_ranks: Ranks, stage: int) -> None:
    results = zero_ranks.run(overflow_of_one_loss, stage)
    assert results[0] == results[1]
    finite, scales, moved = zip(*results[0], strict=True)
    assert finite == (True, False, True)
    assert scales[1] == scales[0] / 2
    assert moved[0] > 0.0 and moved[1] == 0.0 and moved[2] > 0.0


def test_what_is_refused(zero_ranks: Ranks) -> None:
    for said in zero_ranks.run(refusals):
        words = (
            "engine.backward would lose one of the two gradients: call gate.backward",
            "engine.step would lose",
            "step: no gradients",
            "it has a gate already",
            "engine is a Model",
            "use use_reentrant=False",
            "does not support quantized weights or gradients",
            "does not support the optimizer BF16_Optimizer",
            "weight=2.0 must lie",
            "max_angle=200.0 degrees must lie",
            "groups=[0]: one integer",
        )
        assert len(said) == len(words)
        for found, wanted in zip(said, words, strict=True):
            assert wanted in found
