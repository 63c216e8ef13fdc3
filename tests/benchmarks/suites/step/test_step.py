"""The step suite: trainers that train alike are timed, others are left out; memory and parts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fusedacl.benchmarks.measuring.memory import Child, HighWaterMark
from fusedacl.benchmarks.measuring.result_file import ResultFile, read_result
from fusedacl.benchmarks.pages import step_figure
from fusedacl.benchmarks.pages.step import step_section
from fusedacl.benchmarks.suites.step import suite as step
from fusedacl.benchmarks.suites.step import trainers
from fusedacl.benchmarks.suites.step.names import ACL, CE, HUGGING_FACE, TWO_BACKWARD, WORDS
from fusedacl.benchmarks.suites.step.suite import Turns, measure, peak_of_step
from fusedacl.benchmarks.suites.step.trainers import Case, Files, make_trainer, obstacle
from fusedacl.benchmarks.suites.suite import WrongResult
from fusedacl.engine.runtime import processes
from fusedacl.engine.training import micro_batches

TURNS = Turns(rounds=1, steps=2, profiled=0, memory=False)


@pytest.fixture
def case(tiny_bert: Path) -> Case:
    return Case(str(tiny_bert), batch=4, tokens=12)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainers, "NUM_TEXTS", 48)


@pytest.fixture
def without_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    # DeepSpeed sets LOCAL_RANK; monkeypatch removes it again.
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("LOCAL_RANK")
    yield
    processes.leave()


def test_a_whole_run_leaves_a_file_and_a_figure(
    case: Case, tmp_path: Path, without_launcher: None, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    threads = torch.get_num_threads()
    # In the second round the others come after DeepSpeed, which leaves its process group.
    preset = [(case, Turns(2, 2, 1, False)), (replace(case, chunks=3), TURNS)]
    names = (CE, ACL, "fusedacl_acl_head", "deepspeed_ce", HUGGING_FACE, TWO_BACKWARD)
    file = ResultFile(tmp_path / "out" / "step.json", "step", "quick")
    step.run(preset, file, providers=names, threads=threads)
    result = read_result(file.path)
    assert result == json.loads(json.dumps(file.result))
    first, cached = result["cases"]
    assert {*first["providers"], *first["left_out"]} == set(names)
    # DeepSpeed may be missing; all others take part, so they train alike.
    assert set(first["left_out"]) <= {"deepspeed_ce"}
    one, two, three = (main for main, _ in first["losses"][CE])
    assert one != two != three
    for name, times in first["providers"].items():
        assert times["samples"] == 4 and times["over_floor"] > 0
        assert ("shares" in times) == (name in trainers.OURS)
        assert sum(times.get("shares", {"": 1}).values()) == pytest.approx(1)
    # The same products by hand; two backward passes, less what is shared; one pass less again.
    flops = {name: times["flops"] for name, times in first["providers"].items()}
    assert flops[CE] == flops[HUGGING_FACE] < flops["fusedacl_acl_head"] < flops[ACL]
    assert flops[ACL] < 2 * flops[CE]
    assert first["gigaflops"] > 0
    assert first["providers"][ACL]["shares"]["contrastive_backward"] > 0
    assert first["providers"][CE]["shares"]["contrastive_backward"] == 0
    assert [found["what"] for found in cached["bars"]] == ["cached over one shot, time"]
    assert set(cached["providers"]) == {"one_chunk", "cached_batch", "one_shot"}
    step_figure.draw(result, tmp_path / "out" / "step")
    assert (tmp_path / "out" / "step.png").stat().st_size > 1000
    page = "\n".join(step_section(result, "step.png"))
    assert f"| {WORDS[CE]} |" in page and "](step.png)" in page
    assert "| cached batch |" in page and "| exact gate over CE |" in page
    printed = capsys.readouterr().out
    assert "exact gate over CE: " in printed and "cached over one shot, time: " in printed


def test_a_loop_that_trains_otherwise_is_left_out(
    case: Case, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It never adds the contrastive gradient; the learning rate is large enough to show it.
    monkeypatch.setattr(trainers, "cosine_similarity", lambda *a, **k: torch.tensor(-1.0))
    monkeypatch.setattr(trainers, "LEARNING_RATE", 1e-2)
    result = measure(case, TURNS, (CE, TWO_BACKWARD), files, threads=1)
    assert set(result["providers"]) == {CE}
    assert "losses differ by" in result["left_out"][TWO_BACKWARD]


def test_one_of_ours_that_is_wrong_ends_it(
    case: Case, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {"objective": "acl", "temperature": 0.4}
    monkeypatch.setitem(trainers.OPTIONS, "fusedacl_acl_ungated", wrong)
    made = {name: make_trainer(name, case, files) for name in ("fusedacl_acl_ungated", CE)}
    with pytest.raises(WrongResult, match="fusedacl_acl_ungated: its losses differ"):
        step.check(case, made, files)


def test_a_cached_batch_that_trains_otherwise_is_not_timed(
    case: Case, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = micro_batches.cached_losses

    def heavier(chunks: Any, *arguments: Any, weight: float, **settings: Any) -> Any:
        # The batch that it is compared with is one chunk.
        factor = 1.01 if len(chunks) > 1 else 1.0
        return cached(chunks, *arguments, weight=factor * weight, **settings)

    monkeypatch.setattr(micro_batches, "cached_losses", heavier)
    with pytest.raises(WrongResult, match=r"3 chunks.*the losses differ by .*: not timed"):
        step.measure_cached(replace(case, chunks=3), TURNS, files, threads=1)


def test_who_cannot_run_is_left_out_with_the_reason(
    case: Case, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise ValueError("deepspeed is not installed: pip install deepspeed")

    monkeypatch.setattr(trainers, "check_version", missing)
    monkeypatch.setitem(trainers.OPTIONS, "fusedacl_acl_head", {"gate_scop": "head"})
    assert obstacle(CE) is None
    names = (CE, "deepspeed_ce", "fusedacl_acl_head")
    result = measure(case, TURNS, names, files, threads=1)
    assert set(result["providers"]) == {CE}
    assert "pip install deepspeed" in result["left_out"]["deepspeed_ce"]
    assert "Unknown option 'gate_scop'" in result["left_out"]["fusedacl_acl_head"]


class Holder:
    """Holds `size` bytes in its last step, and twice as many in the steps before."""

    def __init__(self, size: int) -> None:
        self.size = size

    def turn(self, num_steps: int, after_step: Any) -> None:
        for number in range(1, num_steps + 1):
            size = self.size if number == num_steps else 2 * self.size
            torch.ones(size, dtype=torch.uint8)
            after_step(number)


@pytest.mark.skipif(not HighWaterMark.is_available(), reason="no high-water mark")
def test_peaks_are_of_the_last_step() -> None:
    with Child(threads=1) as child:
        for size in (32, 96):
            found = child.measure(peak_of_step, partial(Holder, size * 2**20))
            assert isinstance(found, int)
            assert found / 2**20 == pytest.approx(size, abs=6)
