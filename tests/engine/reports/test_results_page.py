"""The results page: claims first, then every sweep, with links to the reports."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fusedacl.engine.reports.results_page import main, results_page


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
    found = "- **ACL instead of 2ST-MHA** (the mean score over the lower half of the exits): +"
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
