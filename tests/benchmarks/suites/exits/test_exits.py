"""The exits suite times equal training and equal answers, and refuses unequal ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fusedacl.benchmarks.suites.exits import suite as exits
from fusedacl.benchmarks.suites.exits.second_stage import STAGES, Runs, second_stage
from fusedacl.benchmarks.suites.exits.suite import early_exit
from fusedacl.benchmarks.suites.suite import WrongResult
from fusedacl.engine.inference.export.onnx_early_exit import OnnxAnswers
from fusedacl.engine.training.feature_cache import FeatureCache


@pytest.fixture
def runs(tmp_path: Path, tiny_bert: Path, tiny_data: Path) -> Runs:
    data = {"task_name": "opinions", "data_dir": str(tiny_data)}
    return Runs(tmp_path, str(tiny_bert), 2, data)


@pytest.mark.parametrize("name", STAGES)
def test_second_stage_times_the_three_ways(runs: Runs, name: str) -> None:
    result = second_stage(runs, name)
    times = result["times"]
    assert times.keys() == {"together", "apart", "cached"}
    assert all(time["samples"] == 2 for time in times.values())
    flops = {way: time["flops"] for way, time in times.items()}
    # One exit learns here, alone or not.
    assert flops["apart"] == flops["together"] > flops["cached"] > 0
    assert times["cached"]["over_floor"] > 0 and result["gigaflops"] > 0


def test_kinds_of_exits_follow_each_other(runs: Runs) -> None:
    first, second = (second_stage(runs, name)["options"] for name in ("mha_ce", "linear_acl"))
    assert first["exit_head"] != second["exit_head"]


def test_a_cache_that_trains_otherwise_is_not_timed(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = FeatureCache.batch

    def shifted(self: FeatureCache, *arguments: Any) -> Any:
        layers, mask = states(self, *arguments)
        return [layer.roll(1, dims=0) for layer in layers], mask

    monkeypatch.setattr(FeatureCache, "batch", shifted)
    with pytest.raises(WrongResult, match=r"mha_ce, cached, exit 1, main loss: .*: not timed"):
        second_stage(runs, "mha_ce")


def test_early_exit_beside_its_export(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    served = exits.exported(runs, "linear")
    assert served is not None
    result = early_exit(runs, "linear", 1, rounds=2, served=served)
    assert result["times"].keys() == {"full", "early_exit", "onnx"}
    monkeypatch.setattr(OnnxAnswers, "probabilities", property(lambda answers: answers.logits))
    with pytest.raises(WrongResult, match="linear, onnxruntime: probabilities: .*: not timed"):
        early_exit(runs, "linear", 1, rounds=2, served=served)


def test_a_missing_onnxruntime_is_named(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exits, "missing", lambda module, name: f"{name} is not installed.")
    assert exits.exported(runs, "linear") is None
    assert "not timed on onnxruntime: onnxruntime is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("batch_size", [1, 32])
def test_early_exit_beside_the_last_exit_alone(runs: Runs, batch_size: int) -> None:
    result = early_exit(runs, "linear", batch_size, rounds=2)
    assert result["batches"] == (16 if batch_size == 1 else 1)
    assert result["times"].keys() == {"full", "early_exit"}


def test_early_exit_that_leaves_is_not_timed(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = exits.EarlyExit
    monkeypatch.setattr(
        exits, "EarlyExit", lambda model, policy: engine(model, "entropy", threshold=1.0)
    )
    with pytest.raises(WrongResult, match="early exit does not answer as the last exit"):
        early_exit(runs, "mha", 32, rounds=1)


def test_bfloat16_is_measured_where_the_cpu_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for expected in (False, True):
        found = {"avx512_bf16": expected, "amx_bf16": False}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        assert exits.computes_bfloat16() is expected
