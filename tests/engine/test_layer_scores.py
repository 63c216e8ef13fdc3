"""Curves over the layers from the results of runs, and runs that do not belong together."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from fusedacl.engine.cli import main
from fusedacl.engine.layer_scores import read_curves, run_label, write_report

OPTIONS: dict[str, Any] = {
    "strategy": "two_stage", "exit_head": "mha", "objective": "acl", "gate": "angle",
    "cross_layer": True, "distill_weight": 0.0,
}  # fmt: skip


def write_run(
    directory: Path, scores: dict[int, float], data: str = "mrpc", **options: Any
) -> Path:
    directory.mkdir()
    results = {
        "data": data,
        "options": {**OPTIONS, **options},
        "metrics": {
            "validation": {layer: {"f1": score, "loss": 0.5} for layer, score in scores.items()}
        },
    }
    (directory / "results.json").write_text(json.dumps(results))
    return directory


def test_labels_are_the_papers() -> None:
    assert run_label(OPTIONS) == "2ST-MHA ACL-CL"
    kd = {**OPTIONS, "objective": "ce", "cross_layer": False, "distill_weight": 0.5}
    assert run_label({**kd, "exit_head": "linear"}) == "2ST-linear CE + KD"
    assert run_label({**OPTIONS, "strategy": "joint", "cross_layer": None, "gate": "none"}) == (
        "JT-MHA ACL without gate"
    )


def test_seeds_are_one_curve(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a1", {1: 0.6, 2: 0.8}),
        write_run(tmp_path / "a2", {1: 0.7, 2: 0.9}),
        write_run(tmp_path / "b", {1: 0.5, 2: 0.8}, objective="ce", cross_layer=False),
    ]
    data, metric, (acl, ce) = read_curves(runs)
    assert (data, metric) == ("mrpc, validation", "f1")
    assert acl.scores == {1: [0.6, 0.7], 2: [0.8, 0.9]}
    assert acl.averages == pytest.approx([0.7, 0.8])
    assert (ce.label, ce.num_seeds) == ("2ST-MHA CE", 1)
    files = write_report(runs, tmp_path / "report")
    assert [file.suffix for file in files] == [".png", ".svg", ".csv", ".md"]
    assert all(file.stat().st_size > 100 for file in files)
    rows = list(csv.reader(files[2].open(newline="")))
    assert rows[0] == ["method", "seeds", "layer 1", "layer 2", "average"]
    assert rows[1] == ["2ST-MHA ACL-CL", "2", "0.6500", "0.8500", "0.7500"]
    assert "| 2ST-MHA ACL-CL | 2 | 65.0 ± 7.1 | 85.0 ± 7.1 | 75.0 ± 7.1 |" in files[3].read_text()


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(write_run(tmp_path / "a", {1: 0.6, 2: 0.8}))
    out = str(tmp_path / "out")
    assert main(["report", run, "--output_dir", out]) == 0
    assert "| 2ST-MHA ACL-CL | 1 | 60.0 | 80.0 | 70.0 |" in capsys.readouterr().out
    assert main(["report", run, str(tmp_path / "absent"), "--output_dir", out]) == 2
    assert "holds no results.json" in capsys.readouterr().err


def test_runs_that_do_not_belong_together(tmp_path: Path) -> None:
    good = write_run(tmp_path / "good", {1: 0.6, 2: 0.8})
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "results.json").write_text("{}")
    for name, other, message in (
        ("data", write_run(tmp_path / "rte", {1: 0.6, 2: 0.8}, data="rte"), "different data"),
        ("layers", write_run(tmp_path / "layers", {2: 0.8}), "not seeds of one experiment"),
        ("nan", write_run(tmp_path / "nan", {1: 0.6, 2: float("nan")}), "layer 2 is nan"),
        (
            "options",
            write_run(tmp_path / "options", {1: 0.6, 2: 0.8}, distill_weight=None),
            "no seed of the same experiment.*distill_weight 0.0 and None",
        ),
        ("broken", broken, "is not the results.json of a run"),
    ):
        with pytest.raises(ValueError, match=message):
            read_curves([good, other])
        assert name
    with pytest.raises(ValueError, match="metric='f2'.*Did you mean 'f1'"):
        read_curves([good], metric="f2")
    with pytest.raises(ValueError, match="runs is empty"):
        read_curves([])
