"""Reading the options of runs, and naming runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fusedacl.engine import TrainingConfig
from fusedacl.engine.config.fields import flatten, write_yaml
from fusedacl.engine.experiments.runs import distinct_labels, method_of, run_config


def test_options_from_either_file_and_of_a_checkpoint(tmp_path: Path) -> None:
    given = TrainingConfig.create(
        task_name="quickstart", output_dir="out", objective="scl", temperature=0.2
    )
    run = tmp_path / "run"
    (run / "checkpoint-3").mkdir(parents=True)
    options = {**flatten(given), "gate": "none"}
    (run / "results.json").write_text(json.dumps({"options": options}))
    assert run_config(run).objective.temperature == 0.2
    write_yaml(given, run / "config.yaml")
    assert run_config(run) == run_config(run / "checkpoint-3") == given
    assert method_of(given) == "single-MHA CE+SCL"
    (run / "config.yaml").write_text("temprature: 3\n")
    with pytest.raises(ValueError, match=r"config.yaml' is not the configuration.*'temperature'"):
        run_config(run)
    with pytest.raises(ValueError, match="holds neither config.yaml nor results.json"):
        run_config(tmp_path)


def test_method_says_what_is_implied() -> None:
    two = {"task_name": "quickstart", "output_dir": "out", "strategy": "two_stage"}
    assert method_of(TrainingConfig.create(**two)) == "2ST-MHA ACL-CL"
    assert method_of(TrainingConfig.create(**two, gate="none")) == "2ST-MHA ACL-CL without gate"


def test_runs_are_told_apart() -> None:
    runs = [Path("a/ce/seed-1"), Path("a/ce/seed-2"), Path("a/acl/seed-1")]
    methods = ["CE", "CE", "ACL"]
    two_methods = ["CE (seed-1)", "CE (seed-2)", "ACL"]
    assert distinct_labels(runs, methods, ["rte"] * 3, None) == two_methods
    one_method = ["CE (ce/seed-1)", "CE (seed-2)", "CE (acl/seed-1)"]
    assert distinct_labels(runs, ["CE"] * 3, ["rte"] * 3, None) == one_method
    assert distinct_labels(runs[1:], ["CE"] * 2, ["rte", "cola"], None) == ["CE, rte", "CE, cola"]
    assert distinct_labels(runs[1:], methods[1:], ["rte"] * 2, " x , y") == ["x", "y"]
    with pytest.raises(ValueError, match="labels='x,x'"):
        distinct_labels(runs[1:], methods[1:], ["rte"] * 2, "x,x")
