"""The results page: claims first, then every sweep, with links to the reports."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fusedacl.engine.reports.page.page import Section, Table
from fusedacl.engine.reports.results_page import main, results_page
from fusedacl.engine.reports.sweep_report import Report


def test_sweeps_on_one_page(
    make_sweep: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    (results / "notes").mkdir()
    claim = {"claim": "ACL wins", "better": "ACL", "than": "2ST-MHA", "exits": "shallow"}
    report: dict[str, Any] = {"layer_scores": ["2ST-MHA", "ACL"], "claims": [claim]}
    statuses, tasks = {("mrpc", "ACL", 3): "waiting"}, ("mrpc", "rte")
    make_sweep(results / "every_method", statuses, report, ("2ST-MHA", "ACL"), tasks)
    report = {"full_model": {"methods": {"ACL": "ACL backbone", "CE": "CE"}}}
    make_sweep(results / "objectives", None, report, ("CE", "ACL backbone"), ("mrpc",))
    output = tmp_path / "docs" / "results.md"
    output.parent.mkdir()
    monkeypatch.setattr(sys, "argv", ["results_page", str(results), "--output", str(output)])
    main()
    page = output.read_text()
    found = "- **“ACL wins”** (the mean score over the lower half of the exits). +"
    assert found in page[: page.index("## Terms")]
    claims = page[page.index("## Claims") : page.index("## Several exits")]
    assert "“ACL wins”: holds on mrpc, rte." in claims
    assert "| task | ACL | 2ST-MHA | difference | 95 % interval | verdict |" in claims
    assert "- Missing: ACL on mrpc, seed 3 (waiting).\n" in claims
    assert "## Several exits: mrpc (validation); rte (validation)" in page
    assert "### Layer scores: mrpc" in page and "### Layer scores: rte" in page
    assert "| method | seeds | layer 1 |" in page
    # The links work: the reports were written, too.
    links = re.findall(r"\]\((reports/[^)]*)\)", page)
    assert len(links) == 5 and all((output.parent / link).exists() for link in links)
    assert (output.parent / "reports" / "every_method" / "index.html").is_file()
    one_exit = page[page.index("## One exit: mrpc (validation)") :]
    assert "### Full models" in one_exit and "Full models against ACL" in one_exit
    with pytest.raises(ValueError, match="No sweeps"):
        results_page({}, Path())


def test_a_task_of_two_sweeps_has_their_names(tmp_path: Path) -> None:
    header = ["task", "ACL", "CE", "difference", "95 % interval", "verdict"]

    def report(*rows: list[str]) -> Report:
        table = Table(header, rows, "“ACL wins”: the mean score over the exits.")
        return Report(tmp_path, [], [Section("Claims", tables=[table])], {"Data": ""}, 1)

    short = report(
        ["rte", "", "", "+1.0", "0.5 to 1.5", "holds"], ["mrpc", "", "", "", "", "not clear"]
    )
    long = report(
        ["rte", "", "", "+2.0", "1.5 to 2.5", "holds"], ["cola", "", "", "", "", "not clear"]
    )
    page = results_page({"reports/short/": short, "reports/long/": long}, tmp_path)
    assert (
        "- **“ACL wins”**. With all texts, use it: +1.0 points on rte (short) (0.5 to 1.5), +2.0 "
        "points on rte (long) (1.5 to 2.5); no clear difference on mrpc, cola.\n"
    ) in page
    claims = page[page.index("## Claims of the paper") :]
    assert claims.index("### short") < claims.index("+1.0") < claims.index("### long")
    assert "### short" not in results_page({"reports/short/": short}, tmp_path)


@pytest.mark.parametrize(
    "verdicts, advice",
    [
        (["holds", "not clear"], "use it"),
        (["holds", "not clear", "not clear"], "a gain is possible"),
        (["not clear"], "nothing speaks for it"),
        (["holds", "holds", "the contrary"], "try it on your data"),
        (["the contrary", "not clear"], "do not use it"),
    ],
)
def test_advice_by_number_of_texts(verdicts: list[str], advice: str, tmp_path: Path) -> None:
    """Tasks with few texts of each class have advice of their own, with the cost of a step."""
    header = ["task", "ACL", "CE", "difference", "95 % interval", "verdict"]
    rows = [[f"few-{i}", "", "", "1", "0 to 2", verdict] for i, verdict in enumerate(verdicts)]
    rows.append(["all", "", "", "0", "-1 to 1", "not clear"])
    table = Table(header, rows, "“ACL beats CE”: the mean score over the exits.")
    few = [row[0] for row in rows[:-1]]
    report = Report(tmp_path, [], [Section("Claims", tables=[table])], {"Data": ""}, 1, few)
    page = results_page({"reports/few/": report}, tmp_path, {"ACL": 1.5})
    (line,) = (line for line in page.splitlines() if line.startswith("- **“ACL beats CE”**"))
    assert line.startswith(f"- **“ACL beats CE”**. With few texts of each class, {advice}: ")
    rest = "With all texts, nothing speaks for it: no clear difference on all."
    assert line.endswith(f"{rest} A step takes 1.50 times as long as one of CE.")
    assert "A step takes" not in results_page({"reports/few/": report}, tmp_path)


def test_times_of_early_exits_with_a_guarantee_come_first(tmp_path: Path) -> None:
    header = ["method", "guarantee", "speed-up, batch 1", "speed-up, batch 32"]
    header += ["onnxruntime, batch 1"]
    rows = [
        ["ACL", "1% at 95%", "2.38x", "2.13x", "5.61x"],
        ["2ST", "1% at 95%", "", "1.70x", ""],
        ["no times", "1% at 95%", "", "", ""],
        ["no guarantee", "", "2.00x", "", ""],
    ]
    section = Section("Early exit: trec6", tables=[Table(header, rows)])
    report = Report(tmp_path, [], [section], {"Data": "trec6 (test)"}, max_exits=6)
    page = results_page({"reports/exits/": report}, tmp_path)
    (line,) = (line for line in page.splitlines() if line.startswith("- **Early exit"))
    assert page.index(line) < page.index("## Terms") and "Differences of the scores" not in page
    assert line == (
        "- **Early exit, guarantee 1% at 95%** (largest share of answers lost, and confidence), "
        "times faster than the full model in PyTorch: trec6 (ACL) 2.38x at batch 1 and 2.13x at "
        "batch 32, 5.61x at batch 1 on onnxruntime; trec6 (2ST) 1.70x at batch 32 "
        "([exits.md](exits.md))."
    )
