"""Reading a sweep's record: scores, and reasons for missing scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from fusedacl.engine.experiments.results import (
    NotThereError,
    Seeds,
    SweepRun,
    missing_notes,
    read_sweep,
)


def a_run(results: dict[str, object], problem: str | None = None) -> SweepRun:
    return SweepRun("mrpc", "ACL", 1, (), Path("."), problem, results)


def test_cells_in_the_recipes_order(unfinished_sweep: Path) -> None:
    sweep = read_sweep(unfinished_sweep)
    assert sweep.tasks == ["mrpc", "cola"]
    assert sweep.methods[:2] == ["CE", "ACL backbone"]
    assert sweep.grids("ACL sweep") == [(("aux_weight", v),) for v in (0.005, 0.02, 0.1)]
    assert sweep.grids("ACL") == [()]
    assert len(sweep.done) == len(sweep.runs) - 3
    assert sweep.metric("cola") == "matthews_correlation"
    assert sweep.splits("cola") == ["validation"]
    (first, _) = sweep.of("mrpc", "ACL sweep", (("aux_weight", 0.02),))
    assert first.label == "ACL sweep, aux_weight 0.02"
    with pytest.raises(ValueError, match="metric='f2' is not among the metrics of mrpc.*'f1'"):
        sweep.metric("mrpc", "f2")


def test_seeds_with_and_without_scores(unfinished_sweep: Path) -> None:
    sweep = read_sweep(unfinished_sweep)

    def last(run: SweepRun) -> float:
        return run.score("matthews_correlation")

    ours = sweep.seeds("cola", "ACL", (), last)
    assert list(ours.values) == [1] and ours.problems == {2: "failed: exit status 1: no memory"}
    assert (len(ours), ours.deviation) == (1, None)
    assert ours.words == f"{100 * ours.values[1]:.1f}"
    none = sweep.seeds("cola", "2ST-linear", (), last)
    assert not none and none.words == "" and none.problems == {1: "waiting", 2: "waiting"}


def test_scores() -> None:
    matched = {"1": {"f1": 0.5, "loss": 1.0}, "10": {"f1": 0.7}}
    other = {"10": {"f1": float("nan")}}
    run = a_run({"metrics": {"validation_matched": matched, "validation_mismatched": other}})
    assert (run.score("f1"), run.score("f1", 1), run.average("f1")) == (0.7, 0.5, 0.6)
    for arguments, words in (
        (("f1", 3), "no exit on layer 3"),
        (("accuracy",), "accuracy at layer 10 is None"),
        (("f1", None, "validation_mismatched"), "f1 at layer 10 is nan"),
        (("f1", None, "test"), "not evaluated on test"),
    ):
        with pytest.raises(NotThereError, match=words):
            run.score(*arguments)
    with pytest.raises(NotThereError, match="running"):
        a_run({}, "running").average("f1")
    with pytest.raises(NotThereError, match="it was not evaluated"):
        a_run({"metrics": {}}).score("f1")


def test_words() -> None:
    assert Seeds({1: 0.6, 2: 0.7}).words == "65.0 ± 7.1"
    problems = {1: "waiting", 2: "failed: x", 3: "waiting"}
    assert missing_notes("ACL", "rte", problems) == [
        "Missing: ACL on rte, seeds 1, 3 (waiting); seed 2 (failed: x)."
    ]
    assert missing_notes("ACL", "rte", {}) == []


def test_done_runs_without_results(make_sweep: Callable[..., Path], tmp_path: Path) -> None:
    directory = make_sweep(tmp_path / "s", methods=("CE",), tasks=("mrpc",))
    first, second, _ = json.loads((directory / "sweep.json").read_text())["cells"]
    (directory / first["directory"] / "results.json").unlink()
    (directory / second["directory"] / "results.json").write_text('{"metrics": {"validation": 3}}')
    problems = [run.problem for run in read_sweep(directory).runs]
    assert problems == ["its results.json is missing", "its results.json is damaged", None]


def test_the_machines_places_are_left_out(make_sweep: Callable[..., Path], tmp_path: Path) -> None:
    failed = {("mrpc", "CE", 1): "failed"}
    directory = make_sweep(tmp_path / "s", failed, methods=("CE",), tasks=("mrpc",))
    record = json.loads((directory / "sweep.json").read_text())
    record["cells"][0]["error"] = f"exit status 2: bad ({directory.resolve()}/cells/x.log)"
    (directory / "sweep.json").write_text(json.dumps(record))
    assert read_sweep(directory).runs[0].problem == "failed: exit status 2: bad (cells/x.log)"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "holds no sweep.json: it is not a sweep"),
        ("[", "is not the record of a sweep"),
        ('{"schema": 1, "recipe": {}}', "is not the record of a sweep"),
        ('{"schema": 1, "recipe": {}, "cells": [{"task": "x"}]}', "is not the record of a sweep"),
        ('{"schema": 2, "recipe": {}, "cells": []}', "has schema 2; .* reads 1"),
        ('{"schema": 1, "recipe": {}, "cells": []}', "has no cells"),
    ],
)
def test_no_sweep(content: str | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        read_sweep(tmp_path)
