"""Values of `gate_scope`, and options with which it has no effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fusedacl.engine import TrainingConfig
from fusedacl.engine.config.fields import parse, write_yaml
from fusedacl.engine.config.gate_scope import parse_scope, scope_words

COMPLETE = {"task_name": "quickstart", "output_dir": "out"}


@pytest.mark.parametrize(
    ("scope", "num_top", "words"),
    [
        ("all", None, "all trained parameters"),
        ("head", 0, "a linear map to the representation that both losses read"),
        ("top:1", 1, "the last layer and the exit"),
        ("top:12", 12, "the last 12 layers and the exit"),
    ],
)
def test_scopes(scope: str, num_top: int | None, words: str) -> None:
    assert parse_scope(scope) == num_top
    assert scope_words(scope) == words


@pytest.mark.parametrize("scope", ["top:0", "top:x", "top:-1", "top:", "top", "top:²", "Head", ""])
def test_what_is_no_scope(scope: str) -> None:
    with pytest.raises(ValueError, match="is not one of all, head, or top:K") as error:
        TrainingConfig.create(**COMPLETE, gate_scope=scope).resolved()
    assert repr(scope) in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "none"}, "gate_scope=top:2 has no effect without the angle check"),
        ({"objective": "ce"}, "gate_scope=top:2 has no effect without the angle check"),
        ({"objective": "scl"}, "use objective=acl \\(or scl\\) with gate=angle"),
        ({"strategy": "joint"}, "strategy=joint trains several exits, and each exit and the back"),
        ({"strategy": "alternating"}, "Use gate_scope=all"),
        ({"strategy": "two_stage", "stage1_model": "some"}, "which stage1_model replaces"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2 .* larger per_device"),
        (
            {
                "per_device_train_batch_size": 8,
                "gradient_accumulation_steps": 4,
                "contrastive_batch_size": 32,
            },
            "which contrastive_batch_size needs too",
        ),
        (
            {"gate_scope": "all", "gate_agreement_steps": 5},
            "gate_agreement_steps=5: gate_scope=all is the exact decision itself",
        ),
        ({"gate_agreement_steps": -1}, "it must be at least 0"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig.create(**{**COMPLETE, "gate_scope": "top:2", **options}).resolved()


@pytest.mark.parametrize(
    "options",
    [
        {"gate_scope": "top:2", "gate_agreement_steps": 7},
        {"gate_scope": "head", "objective": "scl", "gate": "angle"},
        {"gate_scope": "head", "strategy": "two_stage"},
        {"gate_scope": "all", "strategy": "joint", "gradient_accumulation_steps": 4},
    ],
)
def test_the_file_and_the_command_line_say_the_same(
    options: dict[str, Any], tmp_path: Path
) -> None:
    config = TrainingConfig.create(**COMPLETE, **options)
    config.resolved()
    write_yaml(config, tmp_path / "config.yaml")
    assert parse(TrainingConfig, "train", "", [str(tmp_path / "config.yaml")]) == config
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    given = [word for name, value in COMPLETE.items() for word in (f"--{name}", value)]
    assert parse(TrainingConfig, "train", "", [*given, *flags]) == config
