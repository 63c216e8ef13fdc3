"""The `report` section of a recipe: its analyses, and mistakes in it."""

from __future__ import annotations

from typing import Any

import pytest
from fusedacl.engine.experiments.report_plan import GridPlan, Target, plan_report

METHODS: dict[str, Any] = {
    "CE": {"objective": "ce"},
    "ACL": {"strategy": "two_stage"},
    "ACL sweep": {"strategy": "joint", "aux_weight": [0.1, 0.2], "seed_of": [1]},
}


def test_what_is_asked_for() -> None:
    report = {
        "layer_scores": ["ACL"],
        "ablation": {"methods": {"all of it": "ACL", "nothing": "CE"}},
        "grid": [{"option": "aux_weight", "methods": {"ACL": "ACL sweep"}}],
        "full_model": {"methods": {"CE": "CE", "half": {"method": "ACL", "layer": 3}}},
    }
    plan = plan_report({"methods": METHODS, "report": report})
    assert plan.layer_scores == {"ACL": Target("ACL")}
    assert list(plan.ablation) == ["all of it", "nothing"]
    assert plan.grids == (GridPlan("aux_weight", {"ACL": Target("ACL sweep")}),)
    assert plan.full_model == {"CE": Target("CE"), "half": Target("ACL", 3)}
    assert plan_report({"methods": METHODS, "report": {}}).layer_scores == {}
    named = plan_report({"methods": METHODS, "report": {"layer_scores": {"ours": "ACL"}}})
    assert named.layer_scores == {"ours": Target("ACL")}


def test_values_of_a_grid_are_compared_as_numbers() -> None:
    """YAML reads 1e-3 as text."""
    methods = {
        "CE": {"objective": "scl", "aux_weight": ["1e-3", 0.1]},
        "ACL": {"objective": "acl", "aux_weight": [0.1, 0.001]},
    }
    claim = {"claim": "steadier", "better": "ACL", "than": "CE", "spread_over": "aux_weight"}
    recipe = {"tasks": {"rte": {}}, "methods": methods, "report": {"claims": [claim]}}
    (planned,) = plan_report(recipe).claims
    assert planned.spread_over == "aux_weight"
    methods["ACL"]["aux_weight"] = [0.1, 0.002]
    with pytest.raises(ValueError, match="a spread compares equal lists only"):
        plan_report(recipe)


def test_what_suits_a_recipe_that_asks_for_nothing() -> None:
    plan = plan_report({"methods": METHODS})
    assert plan.layer_scores == {"ACL": Target("ACL")} and plan.ablation == {}
    assert plan.full_model == {"CE": Target("CE"), "ACL": Target("ACL")}
    assert [grid.option for grid in plan.grids] == ["aux_weight", "seed_of"]


@pytest.mark.parametrize(
    ("report", "words"),
    [
        ([], "report: expected `analysis: …` lines"),
        ({"ablations": {}}, "unknown key 'ablations'. Did you mean 'ablation'"),
        ({"layer_scores": "ACL"}, "report.layer_scores: expected a list of methods"),
        ({"layer_scores": ["AC"]}, "'AC' is no method of the recipe. Did you mean 'ACL'"),
        ({"ablation": {"ACL": "ACL"}}, "report.ablation: expected `methods:"),
        ({"ablation": {"methods": []}}, "report.ablation.methods: expected `printed name"),
        ({"full_model": {"methods": {"x": {"layer": 3}}}}, "expected a method, or {method"),
        ({"full_model": {"methods": {"x": {"method": "ACL", "layer": 0}}}}, "layer=0 is no layer"),
        ({"ablation": {"methods": {"x": "ACL"}, "metrics": "all"}}, "expected `methods:"),
        ({"full_model": {"methods": {"x": "ACL"}, "metrics": "f1"}}, "metrics='f1': write `all`"),
        ({"grid": {"option": "x"}}, "report.grid: expected a list of tables"),
        ({"claims": {"x": {}}}, "report.claims: expected a list"),
        ({"grid": [{"option": "x"}]}, "report.grid: expected `option` and `methods`"),
        (
            {"grid": [{"option": "aux_weight", "methods": {"ACL": "ACL"}}]},
            "method 'ACL' has no list of values for 'aux_weight'",
        ),
    ],
)
def test_mistakes(report: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan_report({"methods": METHODS, "report": report})
