"""Contradictions and omissions are refused before any work; what is implied is written out."""

from __future__ import annotations

from typing import Any

import pytest
from fusedacl.engine import TrainingConfig

COMPLETE = {"task_name": "quickstart", "output_dir": "out"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fp16": True, "bf16": True}, "fp16 and bf16 are both on"),
        ({"output_dir": None}, "output_dir is missing"),
        ({"task_name": "mrpc"}, "model_name_or_path is missing"),
        ({"objective": "ce", "gate": "angle"}, "gate=angle needs a contrastive loss"),
        ({"exit_width": 63}, "exit_width=63 is not a multiple of exit_attention_heads=4"),
        ({"max_steps": 0}, "max_steps=0 trains nothing"),
        (
            {"overwrite_output_dir": True, "resume_from_checkpoint": "latest"},
            "would delete the checkpoint",
        ),
        ({"temperature": 0}, "temperature=0.0 is out of range: it must be more than 0"),
        ({"aux_weight": 1.5}, "aux_weight=1.5 is out of range: it must be at most 1"),
        ({"aux_weight": -0.1}, "aux_weight=-0.1 is out of range: it must be at least 0"),
        ({"max_angle": 181}, "max_angle=181.0 is out of range: it must be at most 180"),
        ({"objectiv": "ce"}, "Unknown option 'objectiv'. Did you mean 'objective'?"),
        ({"distill_temperature": 4}, "distill_temperature=4 has no effect without distillation"),
        (
            {"strategy": "two_stage", "distill_temperature": 4},
            "distill_temperature=4 has no effect without distillation",
        ),
        ({"gate": "none", "max_angle": 80}, "max_angle=80 has no effect with gate=none"),
        ({"memory_size": -1}, "memory_size=-1 is out of range"),
        ({"memory_warmup_steps": 3}, "memory_warmup_steps=3 has no effect without memory_size"),
        ({"memory_size": 8, "strategy": "joint"}, "memory_size=8: a memory holds"),
        ({"memory_size": 8, "strategy": "alternating"}, "Use strategy=single (or two_stage"),
        (
            {
                "memory_size": 8,
                "strategy": "two_stage",
                "stage1_model": "first",
                "task_name": "mrpc",
            },
            "memory_size=8 belongs to the first stage, which stage1_model replaces",
        ),
        (
            {
                "strategy": "two_stage",
                "stage1_model": "first",
                "task_name": "mrpc",
                "feature_cache": "out/../out/cache",
            },
            "feature_cache='out/../out/cache' lies in output_dir='out': with stage1_model name",
        ),
        ({"temperature_learning_rate": -1}, "temperature_learning_rate=-1.0 is out of range"),
        (
            {"temperature_learning_rate": 0.1, "temperature": 0.01},
            "temperature=0.01: with temperature_learning_rate=0.1 it begins between 0.02 and 5",
        ),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        TrainingConfig.create(**{**COMPLETE, **options}).resolved()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("objective", "gate", "expected"),
    [
        ("ce", None, "none"),
        ("scl", None, "none"),
        ("acl", None, "angle"),
        ("scl", "angle", "angle"),
        ("acl", "none", "none"),
    ],
)
def test_the_gate_follows_the_objective(objective: str, gate: str | None, expected: str) -> None:
    config = TrainingConfig.create(**COMPLETE, objective=objective, gate=gate).resolved()
    assert config.objective.gate == expected
    assert config.gated is (expected == "angle")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"objective": "acl", "temperature": 0.1, "max_angle": 80, "aux_weight": 0.5}, []),
        ({"objective": "scl", "temperature": 0.1, "max_angle": 80}, ["max_angle=80.0"]),
        ({"objective": "scl", "gate": "angle", "max_angle": 80}, []),
        (
            {"objective": "ce", "temperature": 0.1, "contrastive_reduction": "sum"},
            ["temperature=0.1", "contrastive_reduction=sum"],
        ),
        (
            {"objective": "ce", "max_angle": 80, "aux_weight": 0.1, "denominator": "others"},
            ["max_angle=80.0", "aux_weight=0.1", "denominator=others"],
        ),
        ({"objective": "ce"}, []),
    ],
)
def test_what_a_shared_recipe_may_set_is_told_not_refused(
    options: dict[str, Any], expected: list[str]
) -> None:
    config = TrainingConfig.create(**COMPLETE, **options).resolved()
    assert config.without_effect == expected
    # Resolving again changes nothing and refuses nothing.
    assert config.resolved() == config


def test_defaults_may_be_written_out() -> None:
    options = {"gate": "none", "max_angle": 90, "distill_weight": 0, "distill_temperature": 2}
    TrainingConfig.create(**COMPLETE, **options).resolved()
    both = {"strategy": "two_stage", "distill_weight": 0.5, "distill_temperature": 4}
    TrainingConfig.create(**COMPLETE, **both).resolved()
