"""Claims compared with scores: verdicts, differences, and cases without a verdict."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fusedacl.engine.experiments.report_plan import ClaimPlan, plan_report
from fusedacl.engine.experiments.results import SweepResults, SweepRun
from fusedacl.engine.reports.sections.claims import claims_section, verdict_words, weigh

SHALLOW = ClaimPlan("A wins below", "A", "B", shallow=True)
EVERYWHERE = ClaimPlan("A wins", "A", "B")
CALM = ClaimPlan("A is calmer", "A", "B", spread_over="aux_weight")
RECIPE: dict[str, Any] = {
    "methods": {
        "A": {}, "B": {}, "C": {"aux_weight": [0.1, 1.0]}, "D": {"aux_weight": [0.1, 0.5, 1.0]}
    }
}  # fmt: skip


def run_of(
    task: str, method: str, seed: int, layers: Sequence[float] | None, **grid: Any
) -> SweepRun:
    results: dict[str, Any] = {}
    if layers is not None:
        scores = {str(layer): {"f1": score} for layer, score in enumerate(layers, start=1)}
        results = {"metrics": {"validation": scores}, "options": {}}
    problem = None if results else "waiting"
    return SweepRun(task, method, seed, tuple(grid.items()), Path(method), problem, results)


def sweep_of(*runs: SweepRun) -> SweepResults:
    return SweepResults(Path("."), {}, runs, {})


def test_the_lower_half_of_the_exits_decides_where_the_claim_is_about_it() -> None:
    ours = [run_of("mrpc", "A", seed, [0.7 + 0.002 * seed, 0.8, 0.81]) for seed in (1, 2)]
    theirs = [run_of("mrpc", "B", seed, [0.6, 0.8, 0.95]) for seed in (1, 2)]
    sweep = sweep_of(*ours, *theirs)
    (found,), notes = weigh(sweep, SHALLOW)
    assert found.cells == ["mrpc", "70.3 ± 0.1", "60.0 ± 0.0", "+10.3", "+9.0 to +11.6", "holds"]
    (whole,), _ = weigh(sweep, EVERYWHERE)
    assert whole.comparison.difference == pytest.approx(100 * (0.103 - 0.14) / 3)
    assert whole.verdict == "the contrary" and notes == []
    assert verdict_words(EVERYWHERE, [whole]) == "“A wins”: the contrary is seen on mrpc."


def test_of_spreads_the_smaller_is_better() -> None:
    runs = [
        run_of(
            "rte", method, seed, [0.1, 0.5 + reach * weight * (1 + 0.01 * seed)], aux_weight=weight
        )
        for method, reach in (("A", 0.02), ("B", -0.2))
        for seed in (1, 2)
        for weight in (0.0, 0.5, 1.0)
    ]
    (found,), _ = weigh(sweep_of(*runs), CALM)
    assert found.better.values == pytest.approx({1: 0.0101, 2: 0.0102})
    assert found.than.values == pytest.approx({1: 0.101, 2: 0.102})
    assert found.comparison.difference == pytest.approx(9.135) and found.verdict == "holds"
    # A seed lacks a value, as its run is not done or not there, so it has no spread; the other
    # seed alone makes no claim.
    waiting = run_of("rte", "B", 2, None, aux_weight=1.0)
    for others, reason in (([waiting], "waiting"), ([], "2 of 3 values")):
        (found,), notes = weigh(sweep_of(*runs[:-1], *others), CALM)
        assert found.verdict == "one seed: no claim"
        assert notes == [f"Missing: B on rte, seed 2 ({reason})."]


def test_what_is_not_sure_is_said(tmp_path: Path) -> None:
    runs = [
        run_of(task, method, seed, [level + gain * seed if level != 0.815 else level])
        for task, levels in (("mrpc", (0.805, 0.815)), ("rte", (0.6, 0.7)), ("cola", (0.5, 0.3)))
        for method, level, gain in zip("AB", levels, (0.01, 0.0101), strict=True)
        for seed in (1, 2)
    ]
    single = [run_of("sst2", method, 1, [0.9]) for method in "AB"]
    alone = [run_of("trec6", "A", 1, [0.9]), run_of("qqp", "A", 1, [0.9])]
    unfinished = [*alone, run_of("qqp", "B", 1, None)]
    section = claims_section(
        sweep_of(*runs, *single, *unfinished), [EVERYWHERE], None, tmp_path / "claims"
    )
    assert section is not None
    assert section.text == (
        "“A wins”: holds on cola; the contrary is seen on rte; the difference is not clear on "
        "mrpc; a single seed, hence no claim, on sst2."
    )
    assert section.notes[0] == "Missing: B on qqp, seed 1 (waiting)."
    with (tmp_path / "claims.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["task"] for row in rows] == ["mrpc", "rte", "cola", "sst2"]
    assert float(rows[0]["difference"]) == pytest.approx(0.005)
    assert float(rows[0]["mean_better"]) == pytest.approx(0.82)
    # 12.706 is the quantile of two seeds, whose differences are 0 and 0.01.
    low, high = (float(rows[0][f"interval_{end}"]) for end in ("low", "high"))
    assert (low + high) / 2 == pytest.approx(0.005, abs=1e-6)
    assert (high - low) / 2 == pytest.approx(12.706 * 0.005, abs=1e-5)
    assert rows[3]["interval_low"] == rows[3]["deviation_than"] == ""
    assert claims_section(sweep_of(*alone), [EVERYWHERE], None, tmp_path / "none") is None


def test_exits_on_other_layers_are_not_compared() -> None:
    ours = [run_of("mrpc", "A", seed, [0.7, 0.8]) for seed in (1, 2)]
    theirs = [run_of("mrpc", "B", seed, [0.7, 0.8, 0.9]) for seed in (1, 2)]
    evidence, notes = weigh(sweep_of(*ours, *theirs), SHALLOW)
    assert evidence == []
    assert notes == ["“A wins below” on mrpc: not compared, exits on layers 1, 2 and 1, 2, 3."]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"better": None}, "expected `claim`, `better` and `than`"),
        ({"exit": "shallow"}, "unknown key 'exit'. Did you mean 'exits'"),
        ({"exits": "deep"}, "exits='deep' is neither 'all' nor 'shallow'"),
        ({"than": "E"}, "'E' is no method of the recipe"),
        ({"than": "C"}, "method 'C' gives lists of values to .'aux_weight'.; a claim with spread"),
        ({"than": "A"}, "'A' is compared with itself"),
        ({7: 8}, "unknown key 7"),
        ({"better": "C", "than": "D", "spread_over": "aux_weight"}, "compares equal lists only"),
        ({"spread_over": "aux_weight"}, "method 'A' gives lists of values to .*needs a list of"),
    ],
)
def test_mistakes(changes: dict[str, Any], words: str) -> None:
    claim = {"claim": "x", "better": "A", "than": "B", **changes}
    claim = {key: value for key, value in claim.items() if value is not None}
    with pytest.raises(ValueError, match=words):
        plan_report({**RECIPE, "report": {"claims": [claim]}})
