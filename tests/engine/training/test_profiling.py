"""Shares of the parts of a step; profiling does not change the training."""

import gzip
import json
import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fusedacl.engine import GradientGate
from fusedacl.engine.backends.local import LocalBackend
from fusedacl.engine.objectives import gate
from fusedacl.engine.runtime import profiler_marks
from fusedacl.engine.runtime.profiler_marks import part
from fusedacl.engine.training import micro_batches
from fusedacl.engine.training.profiling import Interval, Timeline, summarize, table
from tiny_runs import records, run, weights
from torch.autograd import DeviceType


@pytest.fixture
def options(tiny_options: dict[str, Any]) -> dict[str, Any]:
    steps = {"max_steps": 6, "logging_steps": 1, "save_steps": 0}
    return {**tiny_options, **steps, "per_device_train_batch_size": 8, "device": "cpu"}


def profile_of(options: dict[str, Any], **changes: Any) -> dict[str, Any]:
    run(options, **changes)
    return json.loads((Path(options["output_dir"]) / "profile.json").read_text())


def test_an_instant_belongs_to_the_part_begun_last() -> None:
    timeline = Timeline(
        [
            Interval("step", 100, 200),
            Interval("forward", 100, 140),
            Interval("data", 100, 110),
            # On another thread, and longer than what it began in.
            Interval("communication", 130, 150),
            Interval("optimizer", 160, 190),
            Interval("gate", 160, 165),
            # No step is running: an evaluation.
            Interval("forward", 220, 400),
            Interval("step", 500, 501),
        ]
    )
    seconds = {name: 1e6 * value for name, value in timeline.seconds().items() if value}
    assert seconds == pytest.approx(
        {"data": 10, "forward": 20, "communication": 20, "gate": 5, "optimizer": 25, "other": 21}
    )
    assert timeline.part_at(99) is None and timeline.part_at(300) is None
    assert timeline.part_at(105) == "data"
    assert timeline.part_at(155) == "other"


def event(
    name: str, start: float, end: float, kernels: tuple[tuple[str, float], ...] = ()
) -> SimpleNamespace:
    return SimpleNamespace(
        name=name,
        device_type=DeviceType.CPU,
        time_range=SimpleNamespace(start=start, end=end),
        kernels=[SimpleNamespace(name=kernel, duration=time) for kernel, time in kernels],
    )


def test_on_a_device_kernels_count_for_the_part_that_launched_them() -> None:
    events = [
        event("fusedacl.step", 0, 100, (("fusedacl.step", 500),)),
        event("fusedacl.forward", 10, 30),
        event("aten::mm", 12, 13, (("gemm", 60),)),
        # Autograd launches from a thread of its own, while the part is running.
        event("fusedacl.ce_backward", 40, 90),
        event("MmBackward0", 50, 60, (("gemm", 110), ("ncclDevKernel_AllReduce", 20))),
        event("aten::mm", 150, 160, (("gemm", 1000),)),
    ]
    on_gpu = SimpleNamespace(**vars(event("fusedacl.forward", 12, 900)))
    on_gpu.device_type = DeviceType.CUDA
    found = summarize([*events, on_gpu], torch.device("cuda"))
    shares = {name: share for name, share in found["shares"].items() if share}
    assert shares == pytest.approx(
        {"forward": 60 / 190, "ce_backward": 110 / 190, "communication": 20 / 190}
    )
    assert found["time_of"] == "device"
    assert found["device_busy"] == pytest.approx(1.9)
    assert found["host_shares"]["other"] == pytest.approx(0.3)
    assert "ms on the device" in table(found)
    # A profiler that may not look at the device says what the host did.
    blind = [event(e.name, e.time_range.start, e.time_range.end) for e in events]
    assert summarize(blind, torch.device("cuda"))["time_of"] == "host"
    with pytest.raises(ValueError, match="no step"):
        summarize([event("fusedacl.forward", 0, 1)], torch.device("cpu"))


def test_marks_are_left_only_while_they_are_on() -> None:
    @part("gate")
    def decide() -> int:
        return 7

    def names() -> list[str]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            assert decide() == 7
        return [event.name for event in profiler.events() if event.name.startswith("fusedacl")]

    assert names() == []
    profiler_marks.mark_parts(True)
    try:
        assert names() == ["fusedacl.gate"]
    finally:
        profiler_marks.mark_parts(False)


CE_PARTS = {"data", "forward", "ce_backward", "optimizer", "other"}
ACL_PARTS = {*CE_PARTS, "contrastive_loss", "contrastive_backward", "gate"}
CHUNKED = {"gradient_accumulation_steps": 2, "contrastive_batch_size": 16, "max_steps": 4}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"objective": "ce"}, CE_PARTS),
        ({"objective": "acl", "gate_scope": "head"}, ACL_PARTS),
        ({"objective": "acl", "gate": "none"}, {*CE_PARTS, "contrastive_loss"}),
        ({"objective": "acl"}, ACL_PARTS),
        ({"objective": "acl", **CHUNKED, "profile": 1}, ACL_PARTS),
    ],
)
def test_the_parts_of_a_step(options, changes: dict[str, Any], parts: set[str]) -> None:
    profile = profile_of(options, **{"profile": 2, **changes})
    assert {name for name, share in profile["shares"].items() if share > 0} == parts
    assert sum(profile["shares"].values()) == pytest.approx(1)
    assert profile["num_steps"] == changes.get("profile", 2)
    # Unmarked time is that of Python code between the marks.
    assert profile["shares"]["other"] < 0.5


def test_parts_take_the_time_that_is_spent_in_them(options, monkeypatch) -> None:
    """Sleeps of a known length, in steps of some milliseconds."""

    def slower(owner: Any, name: str, seconds: float) -> None:
        original = getattr(owner, name)

        def slow(*arguments: Any, **settings: Any) -> Any:
            time.sleep(seconds)
            return original(*arguments, **settings)

        monkeypatch.setattr(owner, name, slow)

    slower(gate, "grad_dot_norm", 0.5)
    slower(micro_batches, "collate", 0.2)
    profile = profile_of(options, objective="acl", max_steps=4, profile=1)
    ms = {name: share * profile["step_ms"] for name, share in profile["shares"].items()}
    assert ms["gate"] >= 500 and ms["data"] >= 200
    assert profile["step_ms"] >= 700


def test_training_is_the_same_with_and_without(options, tmp_path: Path, caplog) -> None:
    profiled, plain = Path(options["output_dir"]), tmp_path / "plain"
    with caplog.at_level(logging.INFO, "fusedacl"):
        run(options, profile=2, profile_trace=True)
    assert "angle check and combination" in caplog.text
    run(options, output_dir=str(plain))
    assert not (plain / "profile.json").exists() and not (plain / "trace.json.gz").exists()
    for name, value in weights(profiled).items():
        assert torch.equal(value, weights(plain)[name]), name
    assert records(profiled) == records(plain)
    with gzip.open(profiled / "trace.json.gz", "rt") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    # A mark on the host; some versions repeat it.
    assert "fusedacl.step" in names and "fusedacl.gate" in names


def test_a_run_that_ends_early_leaves_no_marks_and_no_profile(options, monkeypatch) -> None:
    step = LocalBackend.step

    def fails(backend: LocalBackend, **settings: Any) -> Any:
        if backend.optimizer.num_taken == 4:
            raise FloatingPointError("no more")
        return step(backend, **settings)

    monkeypatch.setattr(LocalBackend, "step", fails)
    with pytest.raises(FloatingPointError, match="no more"):
        run(options, profile=3)
    assert not (Path(options["output_dir"]) / "profile.json").exists()
    assert not profiler_marks._marks
    # Nothing is being profiled any more: a profiler can begin.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        weight = torch.nn.Parameter(torch.ones(3))
        GradientGate([weight]).backward(weight.sum(), weight.square().sum())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"profile": -1}, "profile=-1 is out of range"),
        ({"profile": 51}, "it must be at most 50"),
        ({"profile": 4}, "this run has 6 steps to do, the first 3 .* at most 3"),
        ({"profile": 1, "max_steps": 3}, "has 3 steps to do.* a longer one"),
        ({"profile_trace": True}, "profile_trace needs steps"),
        ({"profile": 4, "strategy": "two_stage"}, "this stage has 6 steps to do"),
    ],
)
def test_nonsense_is_refused_before_work(options, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(options, **changes)
    assert not (Path(options["output_dir"]) / "metrics.jsonl").exists()


def test_steps_left_are_counted_from_where_a_run_resumes(options: dict[str, Any]) -> None:
    run(options, save_steps=2)
    with pytest.raises(ValueError, match="has 2 steps to do"):
        run(options, profile=1, save_steps=2, resume_from_checkpoint="checkpoint-4")
