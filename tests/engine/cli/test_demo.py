"""The demonstration with a tiny encoder: its table and figures, and its missing packages."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from fusedacl.engine.cli import demo
from fusedacl.engine.cli.main import main
from fusedacl.engine.training import builder


@pytest.fixture
def tiny(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demonstration with a tiny encoder and four steps."""
    options = demo.demo_options
    of_study = demo.study_options

    def shorter(objective: str, output_dir: Path) -> dict[str, Any]:
        return {**options(objective, output_dir), "max_steps": 4, "disable_tqdm": True}

    def fewer(model: Path) -> dict[str, Any]:
        return {**of_study(model), "measured_samples": 2, "disable_tqdm": True}

    monkeypatch.setattr(demo, "demo_options", shorter)
    monkeypatch.setattr(demo, "study_options", fewer)
    monkeypatch.setattr(demo, "minilm_path", lambda: tiny_bert)
    monkeypatch.setattr(builder, "minilm_path", lambda: tiny_bert)


@pytest.mark.usefixtures("tiny")
def test_table_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # the second run replaces the first
        results = demo.run_demo(tmp_path)
    assert set(results) == {"ce", "acl", "exits", "early_exit"}
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines() if line.startswith(("CE", "ACL"))][-2:]
    scores = [results[name]["metrics"]["validation"][2]["accuracy"] for name in ("ce", "acl")]
    assert [row[1] for row in rows] == [f"{accuracy:.1%}" for accuracy in scores]
    assert rows[0][4] == "-" and rows[1][4].endswith("%")
    for figure in (tmp_path / "loss_curves.png", tmp_path / "gradient_angles.png"):
        assert str(figure) in shown and figure.stat().st_size > 10_000
    assert list(results["exits"]["metrics"]["validation"]) == [1, 2]
    assert not (tmp_path / "features").exists()
    policies = results["early_exit"]["policies"]
    assert set(policies) == {"max_probability"}
    found = policies["max_probability"]
    line = [line for line in shown.splitlines() if line.startswith("  max_probability: ")][-1]
    if "calibration" in found:
        speed = found["measured"][0]["speedup"]
        words = f"{speed:.1f} times faster" if round(speed, 1) > 1 else "not faster"
        assert f"{words} at batch 1" in line
    else:
        assert line.endswith("no setting comes so close")
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    for title in ("Layer scores", "Gate angles", "Early exit"):
        assert title in page


@pytest.mark.usefixtures("tiny")
def test_train_without_arguments_is_the_demonstration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train"]) == 0
    assert (tmp_path / "runs" / "demo" / "acl" / "results.json").exists()


def test_without_matplotlib_nothing_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["train"]) == 2
    assert "pip install 'fusedacl[demo]'" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
