"""Early exit of several runs side by side, from the files of `fusedacl exits`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fusedacl.engine.experiments.results import SweepRun
from fusedacl.engine.reports.sections.early_exit import exits_section


def study(cross_fitted: float | None, **policies: Any) -> dict[str, Any]:
    unseen = None if cross_fitted is None else {"score": cross_fitted}
    calibration = {"score": 0.79, "mean_layer": 3.5, "flops_share": 0.6, "cross_fitted": unseen}
    entropy = {"parameters": {"threshold": 0.25}, "calibration": calibration}
    entropy |= {"area_under_curve": 0.7775, "measured": [{"batch_size": 1, "speedup": 1.5}]}
    return {"metric": "f1", "full_score": 0.8, "policies": {"entropy": entropy, **policies}}


# Without areas and cross-fitted scores, as earlier versions wrote.
OLDER = study(None)
del OLDER["policies"]["entropy"]["area_under_curve"]


def a_run(directory: Path, seed: int, content: Any = None) -> SweepRun:
    run = directory / f"seed-{seed}"
    (run / "exits").mkdir(parents=True)
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        (run / "exits" / "exits.json").write_text(text)
    return SweepRun("mrpc", "ACL", seed, (), run, None, {"metrics": {}})


def test_settings_of_several_runs(tmp_path: Path) -> None:
    broken = study(None)
    broken["policies"]["entropy"]["area_under_curve"] = "0.7"
    no_policy = '{"metric": "f1", "full_score": 1, "policies": {"x": []}, "y": 1}'
    unreached = study(0.78, patience={"area_under_curve": 0.7})
    contents = [unreached, study(None), None, "{", no_policy, OLDER, broken]
    runs = [a_run(tmp_path, seed, content) for seed, content in enumerate(contents, start=1)]
    section = exits_section({"ACL": runs}, "mrpc", tmp_path / "exits", "Early exit")
    assert section is not None
    (table,) = section.tables
    assert table.header[-3:] == ["FLOPs", "area", "speed-up, batch 1"]
    setting = ["entropy", "threshold=0.25"]
    assert table.rows == [
        ["ACL", "1", *setting, "79.0", "78.0", "80.0", "3.50", "60%", "77.8", "1.50x"],
        ["ACL", "2", *setting, "79.0", "", "80.0", "3.50", "60%", "77.8", "1.50x"],
        ["ACL", "6", *setting, "79.0", "", "80.0", "3.50", "60%", "", "1.50x"],
    ]
    assert section.notes == [
        "ACL, seed 4: its exits/exits.json is damaged and left out.",
        "ACL, seed 5: its exits/exits.json is damaged and left out.",
        "ACL, seed 7: its exits/exits.json is damaged and left out.",
        "ACL, seed 1: patience did not reach the target.",
    ]
    assert all(file.stat().st_size > 100 for file in section.files)


def test_timed_settings_are_drawn_as_a_line(tmp_path: Path) -> None:
    timed = [{"score": 0.7, "flops_share": 0.3}, {"score": 0.5, "flops_share": 0.2}]
    pictures, notes = {}, []
    for name, settings in (("without", []), ("with", timed), ("damaged", [0.5])):
        content = study(None)
        content["policies"]["entropy"]["timed"] = settings
        runs = {"ACL": [a_run(tmp_path / name, 1, content)]}
        section = exits_section(runs, "mrpc", tmp_path / name / "exits", "Early exit: mrpc")
        if section is not None:
            pictures[name] = (tmp_path / name / "exits.svg").read_text()
            notes += section.notes
    assert list(pictures) == ["without", "with"] and notes == []
    assert [picture.count('id="series-0-') for picture in pictures.values()] == [1, 2]


def test_what_no_run_has_is_no_column(tmp_path: Path) -> None:
    runs = {"ACL": [a_run(tmp_path, 1, OLDER)]}
    section = exits_section(runs, "mrpc", tmp_path / "exits", "Early exit")
    assert section is not None
    (table,) = section.tables
    names = ["score", "full model", "mean layer", "FLOPs", "speed-up, batch 1"]
    assert table.header[4:] == names and len(table.rows[0]) == 4 + len(names)


def test_exports_and_guarantees(tmp_path: Path) -> None:
    promised = study(None, patience=study(None)["policies"]["entropy"])
    promised["policies"]["entropy"]["calibration"]["guarantee"] = {
        "confidence": 0.95, "risk": "lost_answers", "limit": 0.01, "num_texts": 800,
        "num_lost": 3, "enough_texts": 700, "least_texts": 299,
    }  # fmt: skip
    speed = [{"batch_size": 1, "onnx_ms": 2.0, "pytorch_ms": 4.0, "full_ms": 5.0}]
    policy = {"name": "entropy", "parameters": {"threshold": 0.25}}
    export = {"policy": policy, "quantize": "none", "measured": {"speed": speed}}
    runs = [a_run(tmp_path, seed, promised) for seed in (1, 2, 3)]
    for run, text in zip(runs, (json.dumps(export), "{", None), strict=True):
        write_export(run, text)
    section = exits_section({"ACL": runs}, "mrpc", tmp_path / "exits", "Early exit")
    assert section is not None
    (table,) = section.tables
    assert table.header[-2:] == ["speed-up, batch 1", "onnxruntime, batch 1"]
    assert [row[-1] for row in table.rows] == ["2.50x", "", "", "", "", ""]
    where = table.header.index("guarantee")
    assert [row[where] for row in table.rows] == ["1% at 95%", ""] * 3
    assert "Guarantee: the largest share lost" in table.caption
    damaged, promise, *_ = section.notes
    assert damaged == "ACL, seed 2: its onnx/early_exit.json is damaged and left out."
    assert promise.startswith("ACL, seed 1, entropy: With confidence 0.95, ")
    assert "Lost in the test: 3 of 800 texts" in promise


def write_export(run: SweepRun, text: str | None) -> None:
    (run.directory / "onnx").mkdir()
    if text is not None:
        (run.directory / "onnx" / "early_exit.json").write_text(text)


def test_exports_of_other_settings(tmp_path: Path) -> None:
    """Their times belong to no row; an export without times needs no note."""
    speed = [{"batch_size": 1, "onnx_ms": 2.0, "pytorch_ms": 4.0, "full_ms": 5.0}]
    same = {"name": "entropy", "parameters": {"threshold": 0.25}}
    other = {"name": "entropy", "parameters": {"threshold": 0.5}}
    unstudied = {"name": "patience_confidence", "parameters": {"patience": 2, "threshold": 0.5}}
    exports = [
        {"policy": same, "quantize": "int8", "measured": {"speed": speed}},
        {"policy": other, "quantize": "none", "measured": {"speed": speed}},
        {"policy": unstudied, "quantize": "none", "measured": {"speed": speed}},
        {"policy": other, "quantize": "none"},
    ]
    runs = [a_run(tmp_path, seed, study(None)) for seed in range(1, 5)]
    for run, export in zip(runs, exports, strict=True):
        write_export(run, json.dumps(export))
    section = exits_section({"ACL": runs}, "mrpc", tmp_path / "exits", "Early exit")
    assert section is not None
    assert section.tables[0].header[-1] == "speed-up, batch 1"
    left_out = "the times of the export in onnx are left out:"
    assert section.notes == [
        f"ACL, seed 1: {left_out} with int8 weights it is another model than that of the table.",
        f"ACL, seed 2: {left_out} its policy, entropy threshold=0.5, is in no row of the table.",
        f"ACL, seed 3: {left_out} its policy, patience confidence patience=2 threshold=0.5, is in "
        "no row of the table.",
    ]


def test_no_studies(tmp_path: Path) -> None:
    runs = {"ACL": [a_run(tmp_path, 1)]}
    assert exits_section(runs, "mrpc", tmp_path / "exits", "Early exit") is None
    unreached = {"metric": "f1", "full_score": 0.8, "policies": {"voting": {"area": 1}}}
    runs = {"ACL": [a_run(tmp_path, 2, unreached)]}
    section = exits_section(runs, "mrpc", tmp_path / "exits", "Early exit")
    assert section is not None and section.tables == ()
    assert section.notes == ["ACL, seed 2: voting did not reach the target."]
