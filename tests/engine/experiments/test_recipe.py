"""Recipes: the cells they plan, and messages about mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fusedacl.engine.experiments.recipe import plan_cells, read_recipe, shipped_recipes, slug
from fusedacl.engine.experiments.report_plan import plan_report
from fusedacl.engine.model.multi_exit import parse_layers

SECOND: dict[str, Any] = {"stage1": "CE", "strategy": "two_stage", "objective": "acl"}
METHODS: dict[str, Any] = {
    "CE": {"objective": "ce"},
    "ACL": SECOND,
    "SCL": {"objective": "scl", "aux_weight": [0.1, 0.5], "temperature": [0.1, 1.0]},
}


def recipe(**changes: Any) -> dict[str, Any]:
    made = {
        "defaults": {"model_name_or_path": "bert", "num_hidden_layers": 4, "learning_rate": 1e-4},
        "seeds": [1, 2],
        "share_features": True,
        "tasks": {"rte": {"max_seq_length": 64}, "cola": {"seeds": [7], "methods": ["ACL"]}},
        "methods": METHODS,
    }
    return {**made, **changes}


def test_cells() -> None:
    cells = plan_cells(recipe())
    # Seed by seed; a first stage is added with the method that needs it.
    grid = [f"SCL, aux_weight {w}, temperature {t}" for w in (0.1, 0.5) for t in (0.1, 1.0)]
    assert [cell.name for cell in cells] == [
        *(f"rte, {name}, seed 1" for name in ["CE", "ACL", *grid]),
        *(f"cola, {name}, seed 7" for name in ["CE", "ACL"]),
        *(f"rte, {name}, seed 2" for name in ["CE", "ACL", *grid]),
    ]
    assert len({cell.directory for cell in cells}) == len(cells)
    first, second, third = cells[:3]
    config = second.config(Path("/sweep"))
    assert config.optimization.stage1_model == f"/sweep/{first.directory}"
    assert config.model.model_name_or_path is None and config.model.num_hidden_layers is None
    assert config.data.max_seq_length == 64 and config.data.task_name == "rte"
    assert config.optimization.seed == 1 and config.optimization.learning_rate == 1e-4
    assert str(config.optimization.feature_cache).startswith("/sweep/features/")
    assert first.config(Path("/sweep")).optimization.feature_cache is None
    assert third.config(Path("/sweep")).objective.aux_weight == 0.1
    assert third.directory == "cells/rte/scl/aux_weight-0.1/temperature-0.1/seed-1"
    assert [slug("2ST-MHA + KD"), slug("λ")] == ["2st-mha-kd", "unnamed"]


def test_features_are_shared_by_what_can_share_them() -> None:
    second = {**SECOND, "objective": "ce"}
    methods = {
        "CE": {"objective": "ce"},
        "CE linear": {"objective": "ce", "exit_head": "linear"},
        "A": second,
        "B": {**second, "distill_weight": 0.5},
        "C": {**second, "stage1": "CE linear", "exit_head": "linear"},
        # Features depend on the layers and on the length of the texts.
        "D": {**second, "exit_layers": [2, 4]},
        "E": {**second, "max_seq_length": 32},
        "F": {**second, "max_train_samples_per_class": 8},
        "both stages": {"strategy": "two_stage", "objective": "ce"},
    }
    cells = {c.method: c for c in plan_cells(recipe(tasks={"rte": {}}, seeds=[1], methods=methods))}
    assert cells["A"].features == cells["B"].features
    others = [cells[name].features for name in ("A", "C", "D", "E", "F", "both stages")]
    assert len(set(others)) == 6 and None not in others


def test_layers_are_one_value_and_lists_of_layers_several() -> None:
    joint = {"strategy": "joint", "objective": "ce"}
    methods = {
        "one": {**joint, "exit_layers": [2, 4]},
        "two": {**joint, "exit_layers": [[2, 4], "1,4"]},
    }
    cells = plan_cells(recipe(tasks={"rte": {}}, seeds=[1], methods=methods))
    assert [cell.grid.get("exit_layers") for cell in cells] == [None, "2,4", "1,4"]
    layers = [cell.config(Path("sweep")).model.exit_layers for cell in cells]
    assert [parse_layers(text) for text in layers] == [[2, 4], [2, 4], [1, 4]]


def test_how_long_to_train_is_a_choice_of_its_own() -> None:
    methods = {"CE": {"objective": "ce", "early_stopping_patience": [1, 3]}}
    cells = plan_cells(recipe(tasks={"rte": {}}, seeds=[1], methods=methods))
    assert [cell.config(Path("s")).run.early_stopping_patience for cell in cells] == [1, 3]


def test_no_progress_bar_whatever_the_options_say() -> None:
    defaults = {"model_name_or_path": "bert", "disable_tqdm": "false"}
    for cell in plan_cells(recipe(defaults=defaults)):
        assert cell.config(Path("sweep")).run.disable_tqdm


def test_runs_in_a_service_are_named_after_their_directories() -> None:
    def names(**options: Any) -> list[str | None]:
        methods = {"SCL": METHODS["SCL"] | options}
        cells = plan_cells(recipe(tasks={"rte": {}}, seeds=[1, 2], methods=methods))
        return [cell.config(Path("sweep")).run.run_name for cell in cells]

    found = names(report_to="wandb")
    assert found[0] == "rte/scl/aux_weight-0.1/temperature-0.1/seed-1"
    assert len(set(found)) == len(found) == 8 and names(report_to="all") == found
    assert set(names()) == {None} and set(names(report_to="wandb", run_name="mine")) == {"mine"}


def test_a_path_among_the_values_stays_in_the_sweep() -> None:
    methods = {"CE": {"objective": "ce", "model_name_or_path": ["../../elsewhere", "/tmp/other"]}}
    for cell in plan_cells(recipe(tasks={"rte": {}}, seeds=[1], methods=methods)):
        assert ".." not in Path(cell.directory).parts and len(Path(cell.directory).parts) == 5


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_whole(name: str) -> None:
    made = read_recipe(name)
    made["defaults"].setdefault("model_name_or_path", "an-encoder")
    cells = plan_cells(made)
    planned = {cell.method for cell in cells}
    assert planned == set(made["methods"])
    assert "report" in made
    plan_report(made)


def test_the_papers_recipe_is_the_papers() -> None:
    models = {"paper_bert_base": "bert-base-uncased", "paper_roberta_base": "roberta-base"}
    tasks = {"cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2"}
    for name, model in models.items():
        cells = plan_cells(read_recipe(name))
        assert {cell.task for cell in cells} == tasks
        for cell in cells:
            config = cell.config(Path("sweep")).resolved()
            optimization, objective = config.optimization, config.objective
            assert cell.stage1 is not None or config.model.model_name_or_path == model
            assert (optimization.learning_rate, optimization.weight_decay) == (2e-5, 0.01)
            assert (optimization.num_train_epochs, optimization.warmup_ratio) == (15, 0.1)
            assert (config.model.dropout, config.model.exit_width) == (0.1, 64)
            assert (objective.temperature, objective.aux_weight) == (0.5, 0.02)
            assert (objective.max_angle, objective.contrastive_reduction) == (90, "sum")
            assert optimization.fp16


def test_options_that_the_sweep_does_not_need_are_taken() -> None:
    """A first stage of one's own, a cache of one's own, and what is refused only if it is on."""
    second = {"strategy": "two_stage", "model_name_or_path": None, "num_hidden_layers": None}
    second |= {"stage1_model": "runs/ce", "feature_cache": "cache", "push_to_hub": False}
    (cell,) = plan_cells(
        recipe(tasks={"rte": {}}, seeds=[1], methods={"ACL": second}, share_features=False)
    )
    options = cell.config(Path("sweep")).optimization
    assert (options.stage1_model, options.feature_cache) == ("runs/ce", "cache")


def test_reads_a_file_or_a_shipped_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("seeds: [1]\n")
    assert read_recipe(file) == {"seeds": [1]}
    with pytest.raises(ValueError, match="neither a file nor a shipped recipe.*minilm_all"):
        read_recipe("minilm_al")
    with pytest.raises(ValueError, match="does not exist"):
        read_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {}}, "unknown key 'method'.*'methods'"),
        ({"tasks": {}}, "tasks and methods are needed"),
        ({"tasks": ["rte"]}, "tasks: expected"),
        ({"seeds": [1, 1]}, "seeds of rte: expected a list of different integers"),
        ({"seeds": 3}, "seeds of rte"),
        ({"tasks": {"rte": {"methods": ["ACI"]}}}, "'ACI' is no method.*'ACL'"),
        ({"tasks": {"rte": {"methods": "ACL"}}}, "expected a list of methods"),
        ({"methods": {"CE": {"objectiv": "ce"}}}, "rte, CE, seed 1: Unknown option 'objectiv'"),
        ({"methods": {"CE": {"objective": "kl"}}}, "rte, CE, seed 1: objective='kl'"),
        ({"methods": {"CE": {"aux_weight": [0.1, 2]}}}, "aux_weight 2, seed 1: aux_weight=2"),
        ({"methods": {"CE": {"seed": 3}}}, "seed is the sweep's own"),
        ({"methods": {"A": {"stage1": "B"}}}, "stage1='B' is no method"),
        ({"methods": {"A b": {}, "a-B": {}}}, "would share a directory"),
        ({"methods": None}, "the recipe has no methods"),
        ({"defaults": ["a"]}, "defaults: expected"),
        ({"share_features": "no"}, "share_features='no'"),
        ({"tasks": {"rte": {"methods": [["CE"]]}}}, "is no method of the recipe.*'CE'"),
        ({"methods": {"CE": {"aux_weight": []}}}, "aux_weight has an empty list"),
        ({"methods": {"A": {"aux_weight": [0.1, 0.1]}}}, "are the same run"),
        ({"methods": {"A": {"learning_rate": [1e-3, "1e-3"]}}}, "are the same run"),
        ({"methods": {True: {"objective": "ce"}}}, "reads one of the names as True: put on, off"),
        ({"tasks": {None: {}}}, "tasks: YAML reads one of the names as None"),
        # As --train_file on the command line.
        (
            {
                "tasks": {"a": {}, "b": {}},
                "defaults": {"model_name_or_path": "b", "task_name": "rte"},
            },
            "a, CE, seed 1 and b, CE, seed 1 are the same run: the tasks name the same data",
        ),
        ({"X": {**SECOND, "exit_head": "linear"}}, "X, seed 1: exit_head='linear', .* has 'mha'"),
        ({"X": {"exit_pooling": "mean"}}, "exit_pooling=mean is for linear exits"),
        ({"X": {**SECOND, "exit_width": 32}}, "rte, X, seed 1: exit_width=32, .* stage1 has 64"),
        ({"X": {**SECOND, "stage1": "SCL"}}, "stage1='SCL' has a list of values"),
        ({"X": {**SECOND, "stage1": "ACL"}}, "stage1='ACL' has a stage1 itself"),
        ({"X": {"stage1": ["CE"]}}, "is no method of the recipe.*'CE'"),
        ({"X": {"stage1": "CE"}}, "rte, X, seed 1: stage1_model=.*strategy=two_stage"),
        ({"X": {**SECOND, "stage1_model": "runs/ce"}}, "stage1_model is the sweep's own: leave it"),
        ({"X": {**SECOND, "feature_cache": "cache"}}, "feature_cache is the sweep's own: leave it"),
        ({"X": {"push_to_hub": "true"}}, "rte, X, seed 1: push_to_hub=True: .* Leave it out, and"),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str) -> None:
    """`changes`: of the recipe, or a further method X."""
    changed = {"methods": {**METHODS, **changes}} if "X" in changes else changes
    with pytest.raises(ValueError, match=message):
        plan_cells(recipe(**{"tasks": {"rte": {}}, **changed}))
