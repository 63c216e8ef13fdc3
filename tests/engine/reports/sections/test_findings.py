"""Sentences on numbers: the leader, the lead, and whether it exceeds the deviations."""

from __future__ import annotations

import pytest
from fusedacl.engine.experiments.results import Seeds
from fusedacl.engine.reports.sections.findings import (
    layer_findings,
    overall_finding,
    table_finding,
)
from fusedacl.engine.reports.sections.layer_scores import Curve, LayerScores


def scores(*curves: Curve) -> LayerScores:
    return LayerScores("mrpc, validation", "f1", curves, [])


def seeds(*values: float) -> Seeds:
    return Seeds(dict(enumerate(values, start=1)))


def curve(label: str, scores: dict[int, list[float]]) -> Curve:
    return Curve(label, {layer: seeds(*values) for layer, values in scores.items()})


ACL = curve("ACL", {1: [0.70, 0.72], 2: [0.80, 0.82], 3: [0.85, 0.85], 4: [0.90, 0.90]})
MHA = curve("MHA", {1: [0.60, 0.62], 2: [0.70, 0.72], 3: [0.85, 0.87], 4: [0.91, 0.91]})
CE = curve("CE", {4: [0.99, 0.99]})


def test_comparisons() -> None:
    found = seeds(0.70, 0.72, 0.68).compare(seeds(0.60, 0.61, 0.59))
    assert found.difference == pytest.approx(10)
    # 4.303 is the quantile of three seeds; the differences are 10, 11 and 9.
    assert found.half_width == pytest.approx(4.303 / 3**0.5, abs=1e-3)
    assert found.is_clear
    assert found.words == "+10.0 points (95 % interval of 3 pairs: +7.5 to +12.5)"
    near = seeds(0.69, 0.71, 0.70).compare(seeds(0.70, 0.70, 0.70))
    assert not near.is_clear and near.interval == "-2.5 to +2.5"
    # Differences that hardly vary are clear although the scores themselves vary; equal ones say
    # nothing of their spread.
    assert seeds(0.5, 0.901).compare(seeds(0.4, 0.8)).is_clear
    assert not seeds(0.5, 0.9).compare(seeds(0.4, 0.8)).is_clear
    single = seeds(0.9).compare(seeds(0.1, 0.1))
    assert (
        not single.is_clear
        and single.words == "+80.0 points (fewer than two common seeds: no claim)"
    )
    apart = Seeds({1: 0.9, 2: 0.8}).compare(Seeds({3: 0.1, 4: 0.2}))
    assert not apart.is_clear and apart.num_pairs == 0


def test_one_task() -> None:
    words = layer_findings(scores(MHA, ACL, CE), "ACL")
    assert words.startswith(
        "Averaged over the exits, ACL has 81.8 and the best other method, MHA, 77.2: +4.5 points"
    )
    assert "On layers 1 to 2: +10.0 points" in words
    # At layer 4 the single-exit model has the higher score.
    assert words.endswith("ACL has the highest mean at 2 of 4 exits.")
    behind = layer_findings(scores(MHA, ACL), "MHA")
    assert "ACL, 81.8: -4.5 points" in behind and "at 2 of 4 exits" in behind
    assert layer_findings(scores(ACL, CE), "ACL") == ""
    assert layer_findings(scores(MHA, CE), "ACL") == ""


def test_several_tasks() -> None:
    leader = Curve("MHA", {**ACL.scores, 4: seeds(1, 1)})
    tasks = {"mrpc": scores(MHA, ACL), "rte": scores(ACL, leader)}
    assert overall_finding(tasks, "ACL") == (
        "ACL has the highest score averaged over the exits on 1 of 2 tasks (mrpc), clearly "
        "on mrpc; another method leads on rte (MHA, -2.5 points)."
    )
    single = curve("ACL", {1: [0.7]}), curve("MHA", {1: [0.6]})
    assert overall_finding({"mrpc": scores(*single)}, "ACL").endswith("on none of them.")
    assert overall_finding({"mrpc": scores(MHA)}, "ACL") == ""


def test_a_table() -> None:
    low, high, none = seeds(0.60, 0.62), seeds(0.70, 0.721), seeds()
    rows = {
        "CE": {"mrpc": low, "rte": high},
        "SCL": {"mrpc": high, "rte": low},
        "ACL": {"mrpc": high, "rte": none},
        "absent": {"mrpc": none, "rte": none},
    }
    assert table_finding("Full models", "CE", rows) == (
        "Full models against CE, mean difference in points: SCL +0.0 (2 tasks: 1 clearly higher, 1 "
        "clearly lower); ACL +10.0 (1 task of 2: 1 clearly higher, 0 clearly lower). Clearly: the "
        "95 % interval of the paired differences does not contain 0."
    )
    assert table_finding("Full models", "absent", rows) == ""
    single = {"CE": {"mrpc": seeds(0.5)}, "ACL": {"mrpc": seeds(0.9)}}
    some = {"CE": rows["CE"], "ACL": {"mrpc": high, "rte": seeds(0.5)}}
    assert "1 clearly higher, 0 clearly lower, 1 with single" in table_finding("x", "CE", some)
    assert "ACL +40.0 (1 task: single seeds, no claim)" in table_finding("x", "CE", single)
