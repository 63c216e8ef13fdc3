"""The suite of wider losses writes its file and page; a wrong loss is not timed."""

from __future__ import annotations

from pathlib import Path

import pytest
from fusedacl.benchmarks import cli
from fusedacl.benchmarks.measuring.result_file import read_result
from fusedacl.benchmarks.pages.performance import page, read_directories
from fusedacl.benchmarks.suites.suite import WrongResult
from fusedacl.benchmarks.suites.wider import suite


def test_a_quick_run(tmp_path: Path) -> None:
    assert cli.main(["wider", "--quick", "--output_dir", str(tmp_path)]) == 0
    result = read_result(tmp_path / "wider.json")
    assert list(result["times"]) == list(suite.WORDS)
    for bar, (what, slower, faster, limit, bound) in zip(result["bars"], suite.BARS, strict=True):
        value = result["times"][slower]["p50_ms"] / result["times"][faster]["p50_ms"]
        assert bar["what"] == what and bar["value"] == pytest.approx(value)
        assert bar[bound] == limit
        assert bar["met"] == (value <= limit if bound == "at_most" else value >= limit)
    written = page(read_directories([tmp_path]), tmp_path)
    assert "192 rows of width 16 in 8 classes" in written
    assert "- several labels over plain:" in written


def test_a_wrong_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = suite.make_problems(suite.SIZES["quick"])
    right = suite.dense
    monkeypatch.setattr(suite, "dense", lambda **problem: right(**problem) * 1.001)
    with pytest.raises(WrongResult, match="memory of Q rows: wrong by 1.0e-03"):
        suite.check("memory", problems["memory"])
