"""The whole report of an unfinished sweep, and of single runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fusedacl.engine.cli.main import main
from fusedacl.engine.reports import sweep_report
from fusedacl.engine.reports.sweep_report import Report, write_report
from page_checks import check_page


@pytest.fixture(scope="module")
def report(unfinished_sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    output_dir = tmp_path_factory.mktemp("report")
    picture = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><path d="M 0 0"/></svg>'
    extras = output_dir / "extras"
    (extras / "angles").mkdir(parents=True)
    for name in ("angles/rte", "tsne_3", "without_caption"):
        (extras / f"{name}.svg").write_text(picture)
    (extras / "angles" / "rte.caption.txt").write_text("Angles of rte")
    (extras / "tsne_3.caption.txt").write_text("Representations at layer 3")
    return write_report([unfinished_sweep], output_dir)


def test_every_analysis_is_there(report: Report) -> None:
    check_page(report.page)
    assert [section.title for section in report.sections] == [
        "Layer scores: mrpc", "Layer scores: cola", "Full models", "Ablation",
        "Values of aux_weight", "Gate angles: mrpc", "Gate angles: cola", "More figures",
        "Missing runs", "Commands",
    ]  # fmt: skip
    for section in report.sections[:7]:
        assert [file.suffix for file in section.files] == [".png", ".svg", ".csv", ".md"]
        assert all(file.stat().st_size > 100 for file in section.files)
    text = report.page.read_text()
    for words in (
        "<dd>mrpc (validation); cola (validation)</dd>", "<dd>bert-base-uncased</dd>",
        "<dd>fusedacl 0.1.0, torch 2.6.0</dd>", "33 of 36 done; seeds 1, 2",
        "Representations at layer 3", "Angles of rte", "fusedacl train --task_name mrpc --seed 1",
    ):  # fmt: skip
        assert words in text, words
    assert "without_caption" not in text


def test_what_is_missing_is_named(report: Report) -> None:
    missing = next(section for section in report.sections if section.title == "Missing runs")
    assert list(missing.tables[0].rows) == [
        ["cola", "2ST-linear", "1, 2", "waiting"],
        ["cola", "ACL", "2", "failed: exit status 1: no memory"],
    ]
    assert report.findings[0].startswith("**Unfinished**: 33 of 36 runs are done")
    assert any("averaged over the exits" in finding for finding in report.findings)


def test_a_sweep_from_the_command_line(
    make_sweep: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # No `report` section: the default analyses. A single seed: no claim.
    sweep = make_sweep(
        tmp_path / "s", report=None, methods=("CE", "JT", "2ST-MHA"), tasks=("rte",), seeds=(1,)
    )
    assert main(["report", str(sweep), "--metric", "accuracy"]) == 0
    out = capsys.readouterr().out
    assert "Layer scores: rte" in out and "| JT | 1 |" in out and "Full models" in out
    for name in ("index.html", "layer_scores_rte.svg"):
        assert (sweep / "report" / name).is_file()
    assert main(["report", str(sweep), "--metric", "f1"]) == 2
    assert "metric='f1' is not among the metrics of rte" in capsys.readouterr().err
    run = next(sweep.glob("cells/rte/JT/*/seed-1"))
    assert main(["report", str(sweep), str(run)]) == 2
    assert "is a sweep, whose report stands alone" in capsys.readouterr().err
    record = (sweep / "sweep.json").read_text()
    (sweep / "sweep.json").write_text(record.replace('"done"', '"waiting"'))
    assert main(["report", str(sweep)]) == 2
    assert "no run is done yet" in capsys.readouterr().err


def test_a_task_that_has_not_begun(make_sweep: Callable[..., Path], tmp_path: Path) -> None:
    statuses = {("rte", method, 1): "waiting" for method in ("JT", "2ST-MHA")}
    methods, claim = ("JT", "2ST-MHA"), {"claim": "JT wins", "better": "JT", "than": "2ST-MHA"}
    report = {"layer_scores": list(methods), "claims": [claim]}
    sweep = make_sweep(tmp_path / "s", statuses, report, methods, ("mrpc", "rte"), (1,))
    made = write_report([sweep], tmp_path / "out")
    titles = [section.title for section in made.sections]
    assert titles == ["Claims", "Layer scores: mrpc", "Missing runs", "Commands"]
    # A single seed: a difference, but no claim.
    assert made.findings[1] == "“JT wins”: a single seed, hence no claim, on mrpc."
    assert ": no claim)" in made.sections[1].text


def test_runs_given_by_hand(unfinished_sweep: Path, tmp_path: Path) -> None:
    cells = unfinished_sweep / "cells" / "mrpc"
    runs = [cells / name / "[]" / f"seed-{seed}" for name in ("ACL", "2ST-MHA") for seed in (1, 2)]
    made = write_report(runs, tmp_path / "out")
    check_page(made.page)
    titles = [section.title for section in made.sections]
    assert titles == ["Layer scores", "Gate angles", "Commands"]
    assert "2ST-MHA ACL-CL, 2ST-MHA CE" in made.findings[0]
    assert len(made.sections[-1].commands) == 4
    absent = tmp_path / "absent"
    with pytest.raises(ValueError, match="absent' holds no results.json"):
        write_report([*runs, absent], tmp_path / "out")
    with pytest.raises(ValueError, match="output_dir is missing"):
        write_report(runs)


def test_the_same_report_twice(make_sweep: Callable[..., Path], tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "s", methods=("JT",), report=None, tasks=("rte",), seeds=(1,))
    first = write_report([sweep])
    files = [file for section in first.sections for file in section.files] + [first.page]
    before = {file: file.read_bytes() for file in files}
    write_report([sweep])
    assert len(files) == 9
    assert [file.name for file in files if file.read_bytes() != before[file]] == []


def test_without_matplotlib(
    unfinished_sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="need matplotlib"):
        write_report([unfinished_sweep], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_angles_of_many_values(
    unfinished_sweep: Path, report: Report, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def methods(made: Report) -> tuple[list[str], list[str]]:
        section = next(s for s in made.sections if s.title == "Gate angles: mrpc")
        return list(dict.fromkeys(row[0] for row in section.tables[0].rows)), list(section.notes)

    grid = [f"ACL sweep, aux_weight {value}" for value in (0.005, 0.02, 0.1)]
    assert methods(report) == (["ACL backbone", "ACL", *grid], [])
    monkeypatch.setattr(sweep_report, "_MAX_PANELS", 4)
    made = write_report([unfinished_sweep], tmp_path)
    note = "Left out, having a list of values each: ACL sweep."
    assert methods(made) == (["ACL backbone", "ACL"], [note])
