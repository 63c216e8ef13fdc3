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

    def shorter(objective: str, output_dir: Path) -> dict[str, Any]:
        return {**options(objective, output_dir), "max_steps": 4, "disable_tqdm": True}

    monkeypatch.setattr(demo, "demo_options", shorter)
    monkeypatch.setattr(demo, "minilm_path", lambda: tiny_bert)
    monkeypatch.setattr(builder, "minilm_path", lambda: tiny_bert)


@pytest.mark.usefixtures("tiny")
def test_table_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # the second run replaces the first
        results = demo.run_demo(tmp_path)
    assert set(results) == {"ce", "acl"}
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines() if line.startswith(("CE", "ACL"))][-2:]
    scores = [results[name]["metrics"]["validation"][2]["accuracy"] for name in ("ce", "acl")]
    assert [row[1] for row in rows] == [f"{accuracy:.1%}" for accuracy in scores]
    assert rows[0][4] == "-" and rows[1][4].endswith("%")
    for figure in (tmp_path / "loss_curves.png", tmp_path / "gradient_angles.png"):
        assert str(figure) in shown and figure.stat().st_size > 10_000


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
