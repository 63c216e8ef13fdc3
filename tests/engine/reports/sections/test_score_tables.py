"""Tables 1 to 3 of a sweep: numbers compared with the runs' files, and notes on missing ones."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
from fusedacl.engine import MultiExitConfig, MultiExitForSequenceClassification
from fusedacl.engine.experiments.report_plan import GridPlan, Target
from fusedacl.engine.experiments.results import Seeds, SweepResults, SweepRun, read_sweep
from fusedacl.engine.model.flops import full_flops
from fusedacl.engine.reports.page.page import Section, Table
from fusedacl.engine.reports.sections.score_tables import (
    ablation_section,
    full_model_section,
    grid_section,
    operations,
)
from fusedacl.engine.reports.sections.task_scores import Column, Row, TaskScores
from transformers import BertConfig


@pytest.fixture(scope="module")
def sweep(unfinished_sweep: Path) -> SweepResults:
    return read_sweep(unfinished_sweep)


def table_of(section: Section | None) -> Table:
    assert section is not None
    (table,) = section.tables
    return table


def row_of(section: Section | None, label: str) -> dict[str, str]:
    table = table_of(section)
    row = next(row for row in table.rows if row[0] == label)
    return dict(zip(table.header, row, strict=True))


def averages(
    sweep: SweepResults, task: str, method: str, metric: str, layers: str = "123456"
) -> list[float]:
    """Means over layers for each seed, computed from the files."""
    found = []
    for run in sweep.of(task, method):
        if run.problem is None:
            results = json.loads((run.directory / "results.json").read_text())
            scores = results["metrics"]["validation"]
            found.append(100 * statistics.mean(scores[layer][metric] for layer in layers))
    return found


def words_of(scores: list[float]) -> str:
    return f"{statistics.mean(scores):.1f} ± {statistics.stdev(scores):.1f}"


def test_ablation(sweep: SweepResults, tmp_path: Path) -> None:
    targets = {name: Target(name) for name in ("ACL", "2ST-MHA", "2ST-linear")}
    section = ablation_section(sweep, targets, None, tmp_path / "ablation")
    names = ("mrpc", "cola", "mean of tasks")
    columns = [column for name in names for column in (name, "difference")]
    assert table_of(section).header == ["method", "seeds", *columns]
    rows = {row[0]: row for row in table_of(section).rows}
    ours = averages(sweep, "mrpc", "ACL", "f1")
    other = averages(sweep, "mrpc", "2ST-MHA", "f1")
    assert rows["2ST-MHA"][2] == words_of(other)
    assert rows["2ST-MHA"][3] == f"{statistics.mean(other) - statistics.mean(ours):+.1f}"
    # A seed of two on cola: no deviation there and in the mean over tasks, and its number is shown.
    (single,) = averages(sweep, "cola", "ACL", "matthews_correlation")
    assert rows["ACL"][1] == "1 to 2" and rows["ACL"][4] == f"{single:.1f} (1)"
    assert rows["ACL"][6] == f"{(statistics.mean(ours) + single) / 2:.1f}"
    pairs = zip(other, averages(sweep, "cola", "2ST-MHA", "matthews_correlation"), strict=True)
    assert rows["2ST-MHA"][6] == words_of([statistics.mean(pair) for pair in pairs])
    # No score on cola: no mean over tasks, and a note.
    assert rows["2ST-linear"][1] == "0 to 2" and rows["2ST-linear"][4:] == ["", "", "", ""]
    assert section is not None
    assert "2ST-linear has no mean of tasks: nothing on cola." in section.notes
    assert "Missing: 2ST-linear on cola, seeds 1, 2 (waiting)." in section.notes
    assert any("ACL: the tasks have different seeds" in note for note in section.notes)
    assert "F1 on mrpc; Matthews correlation on cola" in table_of(section).caption
    assert section.text.startswith("Average over the exits against ACL")
    with (tmp_path / "ablation.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert float(lines[2]["mean"]) == pytest.approx(statistics.mean(other) / 100, abs=1e-6)
    assert (lines[1]["seeds"], lines[1]["standard_deviation"]) == ("1", "")
    assert [file.suffix for file in section.files] == [".png", ".svg", ".csv", ".md"]
    assert all(file.is_file() for file in section.files)
    assert ">missing<" in (tmp_path / "ablation.svg").read_text()


def test_tasks_without_all_rows_stay_out_of_an_ablation(
    make_sweep: Callable[..., Path], tmp_path: Path
) -> None:
    directory = make_sweep(tmp_path / "s", methods=("2ST-MHA", "ACL"), seeds=(1,))
    record = json.loads((directory / "sweep.json").read_text())
    record["cells"] = [
        cell for cell in record["cells"] if (cell["task"], cell["method"]) != ("rte", "2ST-MHA")
    ]
    (directory / "sweep.json").write_text(json.dumps(record))
    targets = {name: Target(name) for name in ("ACL", "2ST-MHA")}
    sweep = read_sweep(directory)
    section = ablation_section(sweep, targets, None, tmp_path / "ablation")
    assert "rte" not in table_of(section).header
    assert section is not None
    assert section.notes == ["Not in the table: rte, for which the recipe runs ACL only."]
    # The table of full models has the task; its mean names the tasks that it includes.
    full = full_model_section(sweep, targets, None, tmp_path / "full")
    assert table_of(full).header == ["method", "seeds", "mrpc", "rte", "cola", "mean of mrpc, cola"]
    mrpc, _, cola, mean = map(float, list(row_of(full, "ACL").values())[2:])
    assert mean == pytest.approx((mrpc + cola) / 2, abs=0.06)


def test_full_models(sweep: SweepResults, tmp_path: Path) -> None:
    targets = {"CE": Target("CE"), "third": Target("ACL", 3), "tenth": Target("ACL", 10)}
    section = full_model_section(sweep, targets, None, tmp_path / "full")
    third = averages(sweep, "mrpc", "ACL", "f1", layers="3")
    assert row_of(section, "third")["mrpc"] == f"{words_of(third)} (2)"
    assert row_of(section, "tenth")["mrpc"] == ""
    assert section is not None
    assert "Missing: tenth on mrpc, seeds 1, 2 (it has no exit on layer 10)." in section.notes
    # No model is saved with these results: no columns of operations, and a note.
    assert "GFLOPs" not in table_of(section).header
    assert "No FLOPs for any run: no model is saved with the run." in section.notes


def test_all_metrics_of_a_task(make_sweep: Callable[..., Path], tmp_path: Path) -> None:
    directory = make_sweep(tmp_path / "s", methods=("CE",), tasks=("mrpc", "rte"), seeds=(1,))
    for file in directory.glob("cells/mrpc/**/results.json"):
        results = json.loads(file.read_text())
        results["metrics"]["validation"]["6"]["accuracy"] = 0.75
        file.write_text(json.dumps(results))
    sweep, targets = read_sweep(directory), {"CE": Target("CE")}
    plain = full_model_section(sweep, targets, None, tmp_path / "plain")
    section = full_model_section(sweep, targets, None, tmp_path / "all", all_metrics=True)
    fewer, more = row_of(plain, "CE"), row_of(section, "CE")
    assert list(fewer) == ["method", "seeds", "mrpc", "rte", "mean of tasks"]
    assert list(more) == ["method", "seeds", "mrpc", "mrpc, accuracy", "rte", "mean of tasks"]
    assert more["mrpc, accuracy"] == "75.0" and more["mean of tasks"] == fewer["mean of tasks"]
    assert "(F1 on mrpc; accuracy on rte)" in table_of(section).caption


def test_operations(make_sweep: Callable[..., Path], tmp_path: Path) -> None:
    directory = make_sweep(tmp_path / "s", methods=("CE", "ACL"), tasks=("mrpc",), seeds=(1,))
    sweep = read_sweep(directory)
    backbone = BertConfig(
        hidden_size=32, num_hidden_layers=6, num_attention_heads=2, intermediate_size=64,
        vocab_size=60,
    )  # fmt: skip
    for method, layers in (("ACL", [1, 2, 3, 4, 5, 6]), ("CE", [6])):
        config = MultiExitConfig(backbone, exit_layers=layers, exit_head="mha", exit_width=16)
        config.max_seq_length = 20
        config.save_pretrained(sweep.of("mrpc", method)[0].directory)
    flops, length = operations(sweep.of("mrpc", "CE")[0].directory)
    full = full_flops(MultiExitForSequenceClassification(config))
    assert length == 20
    assert flops == full.per_text + 20 * full.per_token + 400 * full.per_pair
    targets = {"full": Target("CE"), "last": Target("ACL"), "half": Target("ACL", 3)}
    section = full_model_section(sweep, targets, None, tmp_path / "full")
    shares = [row_of(section, label)["share"] for label in targets]
    # Half of the layers, and a small exit.
    assert shares[:2] == ["100%", "100%"] and shares[2] in ("51%", "52%", "53%")
    assert "max_seq_length tokens (20 on mrpc)" in table_of(section).caption
    with pytest.raises(ValueError, match="the model has no exit on layer 3"):
        operations(sweep.of("mrpc", "CE")[0].directory, 3)


def test_values_of_an_option(sweep: SweepResults, tmp_path: Path) -> None:
    plan = GridPlan("aux_weight", {"ours": Target("ACL sweep")})
    section = grid_section(sweep, plan, None, tmp_path / "values")
    assert table_of(section).header == ["aux_weight", "mrpc: ours", "cola: ours"]
    assert [row[0] for row in table_of(section).rows] == ["0.005", "0.02", "0.1"]
    runs = sweep.of("mrpc", "ACL sweep", (("aux_weight", 0.02),))
    scores = [100 * run.average("f1") for run in runs]
    assert table_of(section).rows[1][1] == f"{words_of(scores)} (2)"
    assert section is not None and section.notes == []


def test_differences_are_of_common_seeds(tmp_path: Path) -> None:
    """The ablation is behind on both seeds that it has, and has the higher mean."""
    scores = {"ACL": {1: 0.60, 2: 0.62, 3: 0.20}, "less": {1: 0.58, 2: 0.61}}
    runs = tuple(
        SweepRun(
            "rte", name, seed, (), tmp_path, None, {"metrics": {"validation": {"6": {"f1": score}}}}
        )
        for name, of_method in scores.items()
        for seed, score in of_method.items()
    )
    sweep = SweepResults(tmp_path, {}, runs, {})
    targets = {name: Target(name) for name in scores}
    table = table_of(ablation_section(sweep, targets, None, tmp_path / "ablation"))
    assert [row[2:] for row in table.rows] == [["47.3 ± 23.7", ""], ["59.5 ± 2.1", "-1.5"]]


def test_the_best_by_unpaired_means_is_bold_only_if_it_leads(tmp_path: Path) -> None:
    row, other = Row("A", "A", ()), Row("B", "B", ())
    column = Column("rte", None, "f1", "rte")
    behind = Seeds({1: 0.580, 2: 0.601, 3: 0.9}), Seeds({1: 0.600, 2: 0.620})
    of_both = dict(zip((("A", "rte"), ("B", "rte")), behind, strict=True))
    assert TaskScores([row, other], [column], of_both).leaders == set()
    ahead = {**of_both, ("A", "rte"): Seeds({1: 0.62, 2: 0.641, 3: 0.9})}
    assert TaskScores([row, other], [column], ahead).leaders == {("A", "rte")}


def test_a_number_in_two_spellings_is_one_value(tmp_path: Path) -> None:
    runs = tuple(
        SweepRun(
            "rte", name, 1, (("aux_weight", value),), tmp_path, None,
            {"metrics": {"validation": {"6": {"f1": 0.5}}}},
        )
        for name, value in (("SCL", "1e-4"), ("ACL", 0.0001))
    )  # fmt: skip
    plan = GridPlan("aux_weight", {"SCL": Target("SCL"), "ACL": Target("ACL")})
    sweep = SweepResults(tmp_path, {}, runs, {})
    table = table_of(grid_section(sweep, plan, None, tmp_path / "values"))
    assert [row[0] for row in table.rows] == ["1e-4"] and "" not in table.rows[0]


def test_nothing_is_done(make_sweep: Callable[..., Path], tmp_path: Path) -> None:
    statuses, seeds = {("mrpc", "ACL", 1): "running"}, (1,)
    sweep = read_sweep(make_sweep(tmp_path / "s", statuses, tasks=("mrpc",), seeds=seeds))
    for make_section in (ablation_section, full_model_section):
        assert make_section(sweep, {"ACL": Target("ACL")}, None, tmp_path / "a") is None
    assert list(tmp_path.glob("a.*")) == []
