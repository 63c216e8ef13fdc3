"""Whole runs with `gate_scope`: what they log and leave, how they stop, go on and overflow."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fusedacl.engine.backends import loss_scaling
from fusedacl.engine.reports.run_figures import draw_angle_histogram
from tiny_runs import records, run, weights


@pytest.fixture
def options(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "aux_weight": 0.3}


@pytest.mark.parametrize("scope", ["top:1", "head"])
def test_learns_and_says_so(options: dict[str, Any], scope: str) -> None:
    results = run(options, gate_scope=scope, num_train_epochs=12, max_angle=75)
    assert results["metrics"]["validation"][2]["accuracy"] > 0.85  # chance: 0.5
    assert results["options"]["gate_scope"] == scope
    # The gate did both.
    shares = [row["dropped_share"] for row in results["gate"]]
    assert 0 < sum(shares) < len(shares)
    card = (Path(options["output_dir"]) / "README.md").read_text()
    words = {"top:1": "the last layer and the exit", "head": "a linear map to the representation"}
    assert f"gated at 75 degrees (ACL-Grad), the angle over {words[scope]}" in card


def test_comparing_is_logged_and_changes_no_bit(options: dict[str, Any], tmp_path: Path) -> None:
    choice = {"gate_scope": "head", "max_angle": 70, "logging_steps": 4}
    results = run(options, **choice, gate_agreement_steps=3)
    compared = records(options["output_dir"], "train")
    # Steps that are compared are logged, whatever logging_steps says.
    assert [row["step"] for row in compared] == [3, 4, 6, 8, 9, 12]
    agreed = []
    for row in compared:
        assert ("gate_agrees" in row) is (row["step"] % 3 == 0)
        if "gate_agrees" in row:
            same = (row["angle_degrees"] <= 70) is (row["angle_degrees_all"] <= 70)
            assert row["gate_agrees"] is same
            assert row["angle_degrees"] != row["angle_degrees_all"]
            agreed.append(same)
    # Four steps an epoch.
    found = [(row["compared_steps"], row["agreement_share"]) for row in results["gate"]]
    assert found == [(1, agreed[0]), (1, agreed[1]), (2, sum(agreed[2:]) / 2)]
    plain = tmp_path / "plain"
    run(options, **choice, output_dir=str(plain))
    assert "angle_degrees_all" not in records(plain, "train")[-1]
    for name, value in weights(plain).items():
        assert torch.equal(weights(options["output_dir"])[name], value), name


def test_top_of_all_layers_sees_nearly_the_exact_angle(options, tmp_path: Path) -> None:
    """All but the embeddings decide; the first steps take the same decisions, hence the weights."""
    exact = tmp_path / "exact"
    # A rate at which rounding, which AdamW blows up, stays small.
    small = {"max_steps": 4, "max_angle": 180, "learning_rate": 1e-4, "dropout": 0.0}
    run(options, **small, output_dir=str(exact))
    run(options, **small, gate_scope="top:2")
    both = (records(directory, "train") for directory in (options["output_dir"], exact))
    for here, there in zip(*both, strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-5)
        assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=1e-4)
        assert here["angle_degrees"] == pytest.approx(there["angle_degrees"], abs=15)
        assert here["angle_degrees"] != there["angle_degrees"]


@pytest.mark.parametrize("scope", ["all", "top:1", "head"])
def test_fp16_skips_what_overflows(options, scope: str, monkeypatch) -> None:
    monkeypatch.setattr(loss_scaling, "INITIAL_SCALE", 2.0**24)
    compare = {} if scope == "all" else {"gate_agreement_steps": 1}
    results = run(options, gate_scope=scope, fp16=True, **compare)
    run_directory = Path(options["output_dir"])
    draw_angle_histogram(run_directory, run_directory / "angles.png")
    rows = records(options["output_dir"], "train")
    assert rows[0]["skipped"] and rows[0]["grad_norm"] is None
    assert rows[0]["angle_degrees"] is None
    assert not rows[-1]["skipped"] and 0 < rows[-1]["angle_degrees"] < 180
    assert sum(row["steps"] for row in results["gate"]) == sum(not row["skipped"] for row in rows)
    assert all(value.isfinite().all() for value in weights(options["output_dir"]).values())


def test_the_second_stage_is_exact(options: dict[str, Any]) -> None:
    changes = {"gate_scope": "top:1", "gate_agreement_steps": 1, "num_train_epochs": 1}
    results = run(options, **changes, strategy="two_stage")
    rows = {row["group"]: row for row in results["gate"]}
    assert rows["model"]["compared_steps"] == rows["model"]["steps"] == 4
    assert "compared_steps" not in rows["exit 1"]
    stages = [row["stage"] for row in records(options["output_dir"], "train")]
    assert stages == ["single"] * 4 + ["exits"] * 4
