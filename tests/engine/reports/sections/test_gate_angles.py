"""Histograms and table of the angles that runs logged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from fusedacl.engine.experiments.results import read_sweep
from fusedacl.engine.reports.sections.gate_angles import gate_section


def test_angles_of_a_sweep(make_sweep: Callable[..., Path], tmp_path: Path) -> None:
    methods = ("CE", "ACL backbone", "ACL")
    directory = make_sweep(tmp_path / "s", methods=methods, tasks=("mrpc",), seeds=(1, 2))
    sweep = read_sweep(directory)
    # The gate of a run saw 80 more steps at layer 1 and dropped half of them.
    run = sweep.of("mrpc", "ACL")[0].directory / "results.json"
    results = json.loads(run.read_text())
    row = {"epoch": 3, "group": "exit 1", "steps": 80, "dropped_share": 0.5}
    results["gate"].append(row | {"angle_p10": 60.0, "angle_median": 90.0, "angle_p90": 100.0})
    run.write_text(json.dumps(results))
    runs = {method: read_sweep(directory).of("mrpc", method) for method in sweep.methods}
    section = gate_section(runs, "mrpc", tmp_path / "angles", "Angles")
    assert section is not None
    (table,) = section.tables
    assert table.rows[0][:4] == ["ACL backbone", "2", "model", "160"]
    # 40 steps at 10 %, 40 at 5 %, twice, and 80 at 50 %.
    assert table.rows[1] == ["ACL", "2", "exit 1", "240", "78", "57 to 94", "21.7%"]
    assert [row[2] for row in table.rows[1:]] == [f"exit {layer}" for layer in range(1, 6)]
    assert "(ACL backbone 2, ACL 2)" in section.figures[0].caption
    assert section.notes == []
    (runs["ACL"][1].directory / "metrics.jsonl").unlink()
    section = gate_section(runs, "mrpc", tmp_path / "angles", "Angles")
    assert section is not None and "No histogram of ACL, seed 2" in section.notes[0]
    assert "(ACL backbone 2, ACL 1)" in section.figures[0].caption
    assert gate_section({"CE": runs["CE"]}, "mrpc", tmp_path / "none", "Angles") is None
    assert not (tmp_path / "none.csv").exists()
