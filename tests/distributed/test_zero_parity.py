"""ZeRO 0 to 3 on two ranks take the steps of the local backend on the samples of both."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("deepspeed")

from rank_pool import Ranks
from zero_cases import compare, not_a_number, overflow, resume

# Bounds of the relative error of the weights' change over all steps, and of the error of the angle
# in degrees. In half precision the forward pass rounds.
BARS = {"fp32": (1e-6, 1e-3), "fp16": (1e-2, 0.1), "bf16": (5e-2, 0.3)}
STAGES = [0, 1, 2, 3]
# Gradients reduced in several parts; weights that are released after each use.
BUCKETS = {"reduce_bucket_size": 500, "overlap_comm": True}
RELEASED = {"stage3_param_persistence_threshold": 0, "sub_group_size": 1000}
FP32 = {"dtype": "fp32", "accumulation": 2}
CASES: list[dict[str, Any]] = [
    *({"dtype": dtype, "accumulation": count} for dtype in ("fp32", "fp16") for count in (1, 2)),
    # A small rate, because rounded steps drive the two runs apart, which changes the angles too.
    *(
        {"dtype": "bf16", "accumulation": count, "learning_rate": 3e-4, "max_angle": 89.7}
        for count in (1, 2)
    ),
    FP32 | {"groups": True, "clip": 0.5},
    FP32 | {"groups": True, "clip": 0.5, "independent": True},
    FP32 | {"label_rows": True, "clip": 0.5},
    FP32 | {"gate": "none", "clip": 0.5},
    {"dtype": "fp16", "accumulation": 2, "groups": True, "clip": 0.5, "independent": True},
    {
        "dtype": "fp16",
        "accumulation": 1,
        "clip": 0.5,
        "fp16": {"loss_scale_window": 1, "initial_scale_power": 8},
    },
    {"dtype": "fp16", "accumulation": 2, "gate": "none", "fp16": {"loss_scale": 64}},
]


def named(case: dict[str, Any] | int) -> str:
    if isinstance(case, int):
        return f"stage {case}"
    return " ".join(
        str(value) if name in ("dtype", "gate") else name if value is True else f"{name}={value}"
        for name, value in case.items()
    )


def check(case: dict[str, Any], results: list[dict[str, Any]]) -> None:
    assert results[0] == results[1]
    made = results[0]
    bar, degrees = BARS[case["dtype"]]
    assert made["error"] <= bar
    assert made["unmoved"] == 0.0
    assert made["dtype"] == "torch.float32"
    assert not any(made["skipped"])
    for found, wanted in made["rates"]:
        assert found == pytest.approx(wanted)
    for found, wanted in made["norms"]:
        assert found == pytest.approx(wanted, rel=max(2 * bar, 1e-5))
    assert ("angles" in made) == (case.get("gate") != "none")
    for found, wanted in made.get("angles", []):
        assert found == pytest.approx(wanted, abs=degrees)
    for found, wanted in [*made.get("kept", []), *made.get("active", [])]:
        assert found == wanted


# Each case on two stages, alternately 0 and 2 or 1 and 3, so that every stage has every dtype,
# groups, clipping and no gate; stages differ in how they take a scale that grows.
PAIRS = [
    (stage, case)
    for number, case in enumerate(CASES)
    for stage in STAGES
    if (stage + number) % 2 == 0 or "loss_scale_window" in case.get("fp16", {})
]


@pytest.mark.parametrize(("stage", "case"), PAIRS, ids=lambda value: named(value))
def test_same_steps_as_the_local_backend(
    zero_ranks: Ranks, stage: int, case: dict[str, Any]
) -> None:
    results = zero_ranks.run(compare, stage, case)
    check(case, results)
    if "label_rows" not in case and case.get("gate") != "none":
        # The gate did both in this run.
        kept = {decision[0] for decision, _ in results[0]["kept"]}
        assert kept == {True, False}


@pytest.mark.parametrize(
    ("stage", "zero", "dtype", "label_rows"),
    [
        (1, BUCKETS, "fp32", False),
        (2, BUCKETS, "fp16", False),
        (3, BUCKETS | RELEASED, "fp16", True),
        (3, RELEASED, "fp32", True),
        (3, RELEASED, "fp32", False),
    ],
)
def test_in_parts(
    zero_ranks: Ranks, stage: int, zero: dict[str, Any], dtype: str, label_rows: bool
) -> None:
    case = {"dtype": dtype, "accumulation": 2, "zero": zero, "label_rows": label_rows}
    check(case, zero_ranks.run(compare, stage, case))


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp16"), (1, "fp16"), (2, "fp32"), (3, "fp16")])
def test_a_resumed_run_ends_with_the_same_bits(zero_ranks: Ranks, stage: int, dtype: str) -> None:
    for made in zero_ranks.run(resume, stage, {"dtype": dtype, "accumulation": 1}):
        assert made["error"] == 0.0
        assert made["moved"] > 0.0
        assert f"under ZeRO {stage}" in made["problem"]
        assert "same ZeRO stage" in made["problem"]


@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_of_one_rank_skips_the_step_on_all(zero_ranks: Ranks, stage: int) -> None:
    results = zero_ranks.run(overflow, stage)
    assert results[0] == results[1]
    scales = [scale for scale, _, _ in results[0]]
    skipped = [skip for _, skip, _ in results[0]]
    assert skipped[0] and not skipped[-1]
    for (scale, skip, moved), following in zip(results[0], scales[1:], strict=False):
        assert following == (scale / 2 if skip else scale)
        assert moved == 0.0 or not skip
    assert max(moved for _, _, moved in results[0]) > 0.0


@pytest.mark.parametrize("stage", STAGES)
def test_nan_without_float16_ends_the_run_on_all_ranks(zero_ranks: Ranks, stage: int) -> None:
    for message in zero_ranks.run(not_a_number, stage):
        assert "NaN or infinite" in message
