"""ZeRO 0 to 3 on two ranks take the steps of the local backend on the samples of both."""

from __future__ import annotations

import math
from typing import Any

import pytest

pytest.importorskip("deepspeed")

from exit_cases import compare_exits
from rank_pool import Ranks
from zero_cases import check_reports, compare, not_a_number, overflow, resume

# Bounds of the relative error of the weights' change over all steps, and of the error of the angle
# in degrees. In half precision the forward pass rounds.
BARS = {"fp32": (1e-6, 1e-3), "fp16": (1e-2, 0.1), "bf16": (5e-2, 0.3)}
STAGES = [0, 1, 2, 3]
# Gradients reduced in several parts; weights that are released after each use.
BUCKETS = {"reduce_bucket_size": 500, "overlap_comm": True}
RELEASED = {"stage3_param_persistence_threshold": 0, "sub_group_size": 1000}
# Masters and moments in host memory.
ON_HOST = {"offload_optimizer": {"device": "cpu"}}
BF16 = {"dtype": "bf16", "learning_rate": 3e-4, "max_angle": 89.7}
FP32 = {"dtype": "fp32", "accumulation": 2}
FP16 = {"dtype": "fp16", "accumulation": 1}
CASES: list[dict[str, Any]] = [
    *({"dtype": dtype, "accumulation": count} for dtype in ("fp32", "fp16") for count in (1, 2)),
    # A small rate, because rounded steps drive the two runs apart, which changes the angles too.
    *(BF16 | {"accumulation": count} for count in (1, 2)),
    FP32 | {"groups": True, "clip": 0.5},
    FP32 | {"groups": True, "clip": 0.5, "independent": True},
    FP32 | {"label_rows": True, "clip": 0.5},
    FP32 | {"gate": "none", "clip": 0.5},
    {"dtype": "fp16", "accumulation": 2, "groups": True, "clip": 0.5, "independent": True},
    FP16 | {"clip": 0.5, "fp16": {"loss_scale_window": 1, "initial_scale_power": 8}},
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
    check_reports(made, *BARS[case["dtype"]])
    assert made["unmoved"] == 0.0
    assert made["dtype"] == "torch.float32"
    assert ("angles" in made) == (case.get("gate") != "none")


# Each case on two stages, alternately 0 and 2 or 1 and 3, so that every stage has every dtype,
# groups, clipping and no gate; stages differ in how they take a scale that grows. In host memory
# there is no stage 0.
PAIRS = [
    (stage, case)
    for number, case in enumerate(CASES)
    for stage in STAGES
    if (stage + number) % 2 == 0 or "loss_scale_window" in case.get("fp16", {})
] + [
    (stage, case | {"zero": ON_HOST})
    for stage in STAGES[1:]
    for number, case in enumerate(
        (
            FP32 | {"accumulation": 1},
            FP32 | {"clip": 0.5, "groups": True},
            FP16 | {"accumulation": 2, "clip": 0.5},
            BF16 | {"accumulation": 2},
        )
    )
    if (stage + number) % 2 == 0
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
        (2, BUCKETS | ON_HOST, "fp32", True),
        (3, RELEASED | ON_HOST, "fp32", True),
    ],
)
def test_in_parts(
    zero_ranks: Ranks, stage: int, zero: dict[str, Any], dtype: str, label_rows: bool
) -> None:
    case = {"dtype": dtype, "accumulation": 2, "zero": zero, "label_rows": label_rows}
    check(case, zero_ranks.run(compare, stage, case))


@pytest.mark.parametrize(
    ("stage", "dtype", "zero"),
    [(0, "fp16", {}), (1, "fp16", {}), (2, "fp32", {}), (3, "fp16", {}),
     (1, "fp16", ON_HOST), (2, "fp32", ON_HOST), (3, "fp16", ON_HOST)],
)  # fmt: skip
def test_a_resumed_run_ends_with_the_same_bits(
    zero_ranks: Ranks, stage: int, dtype: str, zero: dict[str, Any]
) -> None:
    case = {"dtype": dtype, "accumulation": 1, "zero": zero}
    for made in zero_ranks.run(resume, stage, case):
        assert made["error"] == 0.0
        assert made["moved"] > 0.0
        # ZeRO 0 with masters in host memory is refused before the state is looked at.
        if (stage, zero) != (3, ON_HOST):
            assert f"under ZeRO {stage}" in made["problem"]
            assert "same ZeRO stage" in made["problem"]


@pytest.mark.parametrize(
    ("stage", "zero"),
    [*((stage, {}) for stage in STAGES), *((stage, ON_HOST) for stage in STAGES[1:])],
)
def test_an_overflow_of_one_rank_skips_the_step_on_all(
    zero_ranks: Ranks, stage: int, zero: dict[str, Any]
) -> None:
    results = zero_ranks.run(overflow, stage, zero)
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


@pytest.mark.parametrize(
    ("zero", "strategy", "together"),
    [
        ({"stage": 0}, "alternating", 1),
        ({"stage": 1}, "alternating", 2),
        ({"stage": 2}, "alternating", 1),
        ({"stage": 2}, "two_stage", 2),
        ({"stage": 3}, "alternating", 2),
        ({"stage": 3, "stage3_param_persistence_threshold": 0}, "alternating", 1),
        ({"stage": 3, "stage3_param_persistence_threshold": 0}, "two_stage", 2),
    ],
)
def test_models_with_exits(
    zero_ranks: Ranks, zero: dict[str, Any], strategy: str, together: int
) -> None:
    """The trainer's sequence of calls, on a model with exits."""
    results = zero_ranks.run(compare_exits, zero, strategy, together)
    assert results[0]["error"] == results[1]["error"]
    for made in results:
        # Where a gradient nearly vanishes, as in the first step of exits that rested, AdamW blows
        # up its rounding.
        check_reports(made, 1e-5 if strategy == "two_stage" else 1e-3, 0.01)
        assert made["changed"] == []
        assert made["not_plain"] == []
        assert math.isfinite(made["loss"])
