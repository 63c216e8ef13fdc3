"""The suite of loops writes its file and page; loops that do not train alike are not timed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fusedacl.benchmarks import cli
from fusedacl.benchmarks.measuring.result_file import read_result
from fusedacl.benchmarks.pages.performance import page, read_directories
from fusedacl.benchmarks.suites.loops import suite
from fusedacl.benchmarks.suites.suite import WrongResult


def test_a_tiny_run(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "minilm_path", lambda: tiny_bert)
    assert cli.main(["loops", "--quick", "--output_dir", str(tmp_path)]) == 0
    result = read_result(tmp_path / "loops.json")
    assert list(result["times"]) == list(suite.WORDS)
    assert [bar["at_most"] for bar in result["bars"]] == [1.75, 1.85]
    written = page(read_directories([tmp_path]), tmp_path)
    assert "gate over CE, FSDP2:" in written and "2 gloo ranks" in written


def of_rank(**changes: Any) -> dict[str, Any]:
    ce, gate = {"losses": [1.0], "angles": []}, {"losses": [1.0], "angles": [60.0]}
    first = {"ddp_ce": ce, "ddp_gate": gate, "fsdp2_ce": ce, "fsdp2_gate": gate}
    return {"first": first | changes}


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (of_rank(fsdp2_ce={"losses": [1.1], "angles": []}), "losses of ddp_ce and fsdp2_ce"),
        (of_rank(fsdp2_gate={"losses": [1.0], "angles": [70.0]}), "angles of ddp_gate"),
    ],
)
def test_loops_that_differ(second: dict[str, Any], words: str) -> None:
    suite.check([of_rank(), of_rank()])
    with pytest.raises(WrongResult, match=words):
        suite.check([second, second])
    with pytest.raises(WrongResult, match="the ranks decide differently"):
        suite.check([of_rank(), of_rank(ddp_gate={"losses": [1.0], "angles": [61.0]})])
