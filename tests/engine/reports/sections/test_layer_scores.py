"""Curves over the layers from the results of runs, and runs that cannot be combined."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from fusedacl.engine.experiments.report_plan import Target
from fusedacl.engine.experiments.results import Seeds, collect_runs, read_sweep
from fusedacl.engine.experiments.runs import run_label
from fusedacl.engine.reports.sections.layer_scores import (
    LayerScores,
    sweep_curves,
    write_layer_scores,
)
from fusedacl.engine.reports.sweep_report import report_runs

OPTIONS: dict[str, Any] = {
    "strategy": "two_stage", "exit_head": "mha", "objective": "acl", "gate": "angle",
    "cross_layer": True, "distill_weight": 0.0,
}  # fmt: skip


def write_run(
    directory: Path, first: float = 0.6, second: float = 0.8, data: str = "mrpc", **options: Any
) -> Path:
    """A run whose exits on layers 1 and 2 have these scores."""
    directory.mkdir()
    scores = {1: {"f1": first, "loss": 0.5}, 2: {"f1": second, "loss": 0.5}}
    results = {"data": data, "options": {**OPTIONS, **options}, "metrics": {"validation": scores}}
    (directory / "results.json").write_text(json.dumps(results))
    return directory


def read_curves(paths: list[Path]) -> LayerScores:
    """The curves of single runs."""
    runs = collect_runs(paths)
    found = sweep_curves(runs, runs.tasks[0], {name: Target(name) for name in runs.methods})
    assert found is not None
    return found


def record_texts(run: Path, labels: str) -> Path:
    content = {"rows": 9, "texts": "t", "labels": labels}
    config = {"data_record": {"splits": {"train": {}, "validation": content}}}
    (run / "config.json").write_text(json.dumps(config))
    return run


def test_runs_that_were_scored_on_other_texts_are_refused(tmp_path: Path) -> None:
    """Their data have the same name, as two files called train.csv have."""
    one = record_texts(write_run(tmp_path / "a"), "x")
    other = record_texts(write_run(tmp_path / "b", objective="ce", cross_layer=False), "y")
    with pytest.raises(
        ValueError, match="a' and '.*b' were evaluated on different texts or labels"
    ):
        collect_runs([one, other])
    record_texts(other, "x")
    assert len(collect_runs([one, other]).runs) == 2
    # Texts that options leave out are warned of.
    fewer = write_run(tmp_path / "f", objective="ce", cross_layer=False, max_eval_samples=5)
    assert len(collect_runs([one, record_texts(fewer, "y")]).runs) == 2
    # Held-out texts are another part for each seed.
    held_out = {"validation_split_percentage": 20, "subset_seed": 1, "seed": 1}
    first = record_texts(write_run(tmp_path / "c", **held_out), "x")
    second = write_run(tmp_path / "d", **{**held_out, "subset_seed": 2, "seed": 2})
    assert len(collect_runs([first, record_texts(second, "y")]).runs) == 2
    rival = write_run(tmp_path / "e", objective="ce", cross_layer=False, **held_out)
    with pytest.raises(ValueError, match="c' and '.*e' were evaluated on different texts"):
        collect_runs([first, record_texts(rival, "y")])


def test_labels_are_the_papers() -> None:
    assert run_label(OPTIONS) == "2ST-MHA ACL-CL"
    kd = {**OPTIONS, "objective": "ce", "cross_layer": False, "distill_weight": 0.5}
    assert run_label({**kd, "exit_head": "linear"}) == "2ST-linear CE + KD"
    assert run_label({**OPTIONS, "strategy": "joint", "cross_layer": None, "gate": "none"}) == (
        "JT-MHA ACL without gate"
    )


def test_seeds_are_one_curve(tmp_path: Path) -> None:
    seeds = [write_run(tmp_path / "a1"), write_run(tmp_path / "a2", 0.7, 0.9)]
    other = write_run(tmp_path / "b", 0.5, objective="ce", cross_layer=False)
    found = read_curves([*seeds, other])
    acl, ce = found.curves
    assert (found.data, found.metric, found.notes) == ("mrpc, validation", "f1", [])
    assert acl.scores == {1: Seeds({0: 0.6, 1: 0.7}), 2: Seeds({0: 0.8, 1: 0.9})}
    assert list(acl.average().values.values()) == pytest.approx([0.7, 0.8])
    assert (ce.label, ce.num_seeds) == ("2ST-MHA CE", 1)
    files = write_layer_scores(found, tmp_path / "scores", "Scores").files
    assert [file.suffix for file in files] == [".png", ".svg", ".csv", ".md"]
    assert all(file.stat().st_size > 100 for file in files)
    rows = list(csv.reader(files[2].open(newline="")))
    assert rows[0] == ["method", "seeds", "layer 1", "layer 2", "average"]
    assert rows[1] == ["2ST-MHA ACL-CL", "2", "0.6500", "0.8500", "0.7500"]
    assert "| 2ST-MHA ACL-CL | 2 | 65.0 ± 7.1 | 85.0 ± 7.1 | 75.0 ± 7.1 |" in files[3].read_text()


def test_runs_that_do_not_belong_together(tmp_path: Path) -> None:
    good = write_run(tmp_path / "good", seed=1)
    layers, broken = write_run(tmp_path / "layers"), write_run(tmp_path / "broken")
    results = json.loads((layers / "results.json").read_text())
    del results["metrics"]["validation"]["1"]
    (layers / "results.json").write_text(json.dumps(results))
    (broken / "results.json").write_text("{}")
    words = "no seed of the same experiment.*distill_weight 0.0 and None"
    twice = "have the same seed, 1, and would count as two"
    for other, message in (
        (write_run(tmp_path / "rte", data="rte"), "different data"),
        (layers, "not seeds of one experiment"),
        (write_run(tmp_path / "options", distill_weight=None), words),
        (broken, "is not the results.json of a run"),
        (good, twice),
        (write_run(tmp_path / "again", seed=1), twice),
    ):
        with pytest.raises(ValueError, match=message):
            read_curves([good, other])
    with pytest.raises(ValueError, match="metric='f2'.*Did you mean 'f1'"):
        report_runs([good], tmp_path / "out", "f2")
    with pytest.raises(ValueError, match="runs is empty"):
        read_curves([])
    other = write_run(tmp_path / "other", seed=1, objective="ce")
    assert [curve.num_seeds for curve in read_curves([good, other]).curves] == [1, 1]


def test_methods_on_other_texts_are_told(tmp_path: Path) -> None:
    whole = write_run(tmp_path / "a", max_eval_samples=None)
    part = write_run(tmp_path / "b", objective="ce", max_eval_samples=64)
    (note,) = read_curves([whole, part]).notes
    assert "differ in max_eval_samples" in note and "2ST-MHA ACL-CL all, 2ST-MHA CE-CL 64" in note
    assert read_curves([whole]).notes == []


def test_scores_that_are_no_numbers_are_named_and_left_out(tmp_path: Path) -> None:
    good, bad = write_run(tmp_path / "good"), write_run(tmp_path / "bad", 0.6, float("nan"))
    endless = write_run(tmp_path / "endless", float("inf"), objective="ce")
    found = read_curves([good, bad, endless])
    (curve,) = found.curves
    assert curve.label == "2ST-MHA ACL-CL"
    assert curve.scores == {1: Seeds({0: 0.6}), 2: Seeds({0: 0.8})}
    assert found.notes == [
        "Missing: 2ST-MHA ACL-CL on mrpc, seed 1 (f1 at layer 2 is nan).",
        "Missing: 2ST-MHA CE-CL on mrpc, seed 2 (f1 at layer 1 is inf).",
    ]
    with pytest.raises(ValueError, match="no run has finite scores: f1 at layer 2 is nan"):
        report_runs([bad], tmp_path / "out")


def test_curves_of_a_sweep(unfinished_sweep: Path, tmp_path: Path) -> None:
    sweep = read_sweep(unfinished_sweep)
    targets = {"linear": Target("2ST-linear"), "mha": Target("2ST-MHA"), "ours": Target("ACL")}
    found = sweep_curves(sweep, "cola", targets)
    assert found is not None
    assert (found.data, found.metric) == ("cola, validation", "matthews_correlation")
    # The looks are the same as on tasks with all methods.
    assert [(curve.label, curve.place) for curve in found.curves] == [("mha", 1), ("ours", 2)]
    assert [curve.num_seeds for curve in found.curves] == [2, 1]
    results = json.loads((sweep.of("cola", "ACL")[0].directory / "results.json").read_text())
    scores = results["metrics"]["validation"]
    assert found.curves[1].scores[3] == Seeds({1: scores["3"]["matthews_correlation"]})
    assert found.notes == [
        "Missing: linear on cola, seeds 1, 2 (waiting).",
        "Missing: ours on cola, seed 2 (failed: exit status 1: no memory).",
    ]
    section = write_layer_scores(found, tmp_path / "scores", "Scores")
    assert found.notes == list(section.notes)
    assert "(mha 2, ours 1)" in section.figures[0].caption
    svg = (tmp_path / "scores.svg").read_text()
    assert 'id="series-1-0"' in svg and 'id="legend-2"' in svg and 'id="series-0-0"' not in svg
    assert "waiting" in (tmp_path / "scores.md").read_text()


def test_averages_over_different_layers_are_not_compared_silently(
    unfinished_sweep: Path, tmp_path: Path
) -> None:
    sweep = read_sweep(unfinished_sweep)
    found = sweep_curves(sweep, "mrpc", {"CE": Target("CE"), "ACL": Target("ACL")})
    assert found is not None
    (note,) = write_layer_scores(found, tmp_path / "scores", "Scores").notes
    assert note == (
        "The averages are over different layers and cannot be compared: CE: layers 6; ACL: layers "
        "1, 2, 3, 4, 5, 6."
    )
    assert sweep_curves(sweep, "cola", {"x": Target("2ST-linear")}) is None
