"""A results page that claims no more than the numbers say."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fusedacl.engine.reports.results_page import main, results_page


def run_results(objective: str, seed: int, accuracy: float, **changes: Any) -> dict[str, Any]:
    gate = [
        {
            "epoch": epoch,
            "steps": 10,
            "dropped_share": share,
            "angle_p10": 60.0,
            "angle_median": 75.0,
            "angle_p90": 95.0,
        }
        for epoch, share in ((1, 0.3), (2, 0.1))
    ]
    return {
        "data": "mrpc",
        "objective": objective,
        "seed": seed,
        "metrics": {"validation": {"6": {"accuracy": accuracy, "loss": 0.5}}},
        "gate": gate if objective == "acl" else [],
        "train_samples_per_second": 50.0,
        "options": {"objective": objective, "seed": seed, "temperature": 0.5},
        "command": f"fusedacl train --objective {objective} --seed {seed}",
        **changes,
    }


def page_of(tmp_path: Path, *runs: dict[str, Any]) -> str:
    files = []
    for index, run in enumerate(runs):
        files.append(tmp_path / f"{index}.json")
        files[-1].write_text(json.dumps(run))
    return results_page(files, {})


def test_a_clear_win_is_said_and_marked(tmp_path: Path) -> None:
    runs = [run_results("ce", seed, 0.80 + 0.002 * seed) for seed in (1, 2, 3)]
    runs += [run_results("acl", seed, 0.85 + 0.002 * seed) for seed in (1, 2, 3)]
    page = page_of(tmp_path, *runs)
    assert "| CE | 3 | 80.4 ± 0.2 | 0.500 | - |" in page
    assert "| ACL | 3 | **85.4 ± 0.2** | 0.500 | 20.0% |" in page
    assert "more than the sum of the standard deviations, 0.4): ACL wins." in page
    assert "| 1 | 30 | 30.0% | 75 | 60 to 95 |" in page
    assert page.count("fusedacl train --objective") == 6


def test_a_loss_and_a_draw_are_said_as_plainly(tmp_path: Path) -> None:
    ce = [run_results("ce", seed, 0.80 + 0.02 * seed) for seed in (1, 2)]
    worse = [run_results("acl", seed, 0.70 + 0.02 * seed) for seed in (1, 2)]
    page = page_of(tmp_path, *ce, *worse)
    assert "ACL loses" in page
    equal = [run_results("acl", seed, 0.81 + 0.02 * seed) for seed in (1, 2)]
    page = page_of(tmp_path, *ce, *equal)
    assert "ACL - CE = +1.0 points (2 and 2 seeds; within the sum" in page
    assert "2.8): ACL does not win." in page
    assert "**" not in page


def test_runs_with_other_settings_are_not_averaged(tmp_path: Path) -> None:
    other = {"objective": "acl", "seed": 1, "temperature": 0.1}
    runs = [run_results("ce", 1, 0.8), run_results("acl", 1, 0.8, options=other)]
    with pytest.raises(ValueError, match="temperature=0.5 and temperature=0.1 cannot stand in one"):
        page_of(tmp_path, *runs)


def test_one_seed_claims_nothing(tmp_path: Path) -> None:
    page = page_of(tmp_path, run_results("ce", 1, 0.6), run_results("acl", 1, 0.9))
    assert "1 and 1 seeds: no claim" in page
    assert "**" not in page


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"metrics": {}}'])
def test_not_a_results_file(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=r"x.json' is not the results.json of a run"):
        results_page([tmp_path / "x.json"], {})
    with pytest.raises(ValueError, match="No results files"):
        results_page([], {})


def test_sweeps_and_runs_on_one_page(
    make_sweep: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    (results / "mrpc-ce.json").write_text(json.dumps(run_results("ce", 1, 0.8)))
    (results / "notes").mkdir()
    claim = {"claim": "ACL wins", "better": "ACL", "than": "2ST-MHA", "exits": "shallow"}
    make_sweep(
        results / "every_method",
        {("mrpc", "ACL", 3): "waiting"},
        report={"layer_scores": ["2ST-MHA", "ACL"], "claims": [claim]},
        methods=("2ST-MHA", "ACL"),
        tasks=("mrpc", "rte"),
    )
    output = tmp_path / "docs" / "results.md"
    output.parent.mkdir()
    monkeypatch.setattr(sys, "argv", ["results_page", str(results), "--output", str(output)])
    main()
    page = output.read_text()
    claims = page[page.index("## Claims") : page.index("## Several exits")]
    assert "“ACL wins”: holds on mrpc, rte." in claims
    assert "| task | ACL | 2ST-MHA | difference | noise | verdict |" in claims
    assert "- Missing: ACL on mrpc, seed 3 (waiting).\n" in claims
    assert "## Several exits: mrpc (validation); rte (validation)" in page
    assert "### Layer scores: mrpc" in page and "### Layer scores: rte" in page
    assert "| method | seeds | layer 1 |" in page
    # What the page links to is there: it wrote the reports, too.
    links = re.findall(r"\]\((reports/[^)]*)\)", page)
    assert len(links) == 3 and all((output.parent / link).exists() for link in links)
    assert (output.parent / "reports" / "every_method" / "index.html").is_file()
    assert page.index("## One exit") < page.index("### mrpc")
