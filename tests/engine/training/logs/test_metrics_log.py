"""metrics.jsonl across a resume, and the gate's summary."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fusedacl.engine.training.logs.metrics_log import MetricsLog
from fusedacl.engine.training.records import GateHistory


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def write_steps(output_dir: Path, steps: range, resume_step: int | None = None) -> None:
    with MetricsLog(output_dir, (), resume_step) as log:
        for step in steps:
            log.write({"step": step, "split": "train", "loss": 0.5})


def test_resuming_drops_what_will_be_written_again(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 8))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "spl')  # the run was killed while it wrote
    write_steps(tmp_path, range(5, 7), resume_step=4)
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 5, 6]


def test_a_line_cut_inside_an_object_is_left_out(tmp_path: Path) -> None:
    whole = {"step": 1, "split": "validation", "exit": 2, "metrics": {"f1": 0.5}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(whole) + "\n" + json.dumps(whole)[:-1])
    with MetricsLog(tmp_path, resume_step=1) as log:
        assert log.evaluations(1) == {"validation": {2: {"f1": 0.5}}}
        assert log.evaluations(2) == {}


@pytest.mark.parametrize(
    "garbage", [b"\x00\x80", b"[]", b'{"step": 1}', b'{"split": "train"}', b"1"]
)
def test_a_line_that_is_no_record_is_named(garbage: bytes, tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 3))
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(garbage + b"\n" + file.read_bytes())
    with pytest.raises(
        ValueError, match=r"metrics.jsonl', line 1, is not a record .*Take the line"
    ):
        MetricsLog(tmp_path, resume_step=1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_names_the_file_and_closes_the_services(tmp_path: Path) -> None:
    closed: list[str] = []
    service: Any = SimpleNamespace(close=closed.append)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    message = "metrics.jsonl could not be written: .*No space left.*Free some space; a run"
    with pytest.raises(OSError, match=message), MetricsLog(tmp_path, [service]) as log:
        log.write({"step": 1, "split": "train"})
    assert closed == ["FAILED"]


def test_gate_summary_by_epoch_and_group() -> None:
    history = GateHistory()
    for epoch, group, angle, dropped in (
        (1, "exit 1", 80, False),
        (1, "exit 2", 10, False),
        (1, "exit 1", 100, True),
        (2, "exit 1", 60, False),
        (2, "exit 1", 70, False),
    ):
        history.add(epoch, group, angle, dropped)
    first, second, third = history.summary()
    assert (first["epoch"], first["group"]) == (1, "exit 1")
    assert (first["steps"], first["dropped_share"], first["angle_median"]) == (2, 0.5, 90)
    assert (first["angle_p10"], first["angle_p90"]) == pytest.approx((82, 98))
    assert (second["group"], second["steps"]) == ("exit 2", 1)
    assert (third["epoch"], third["dropped_share"]) == (2, 0.0)
    assert "compared_steps" not in first
    assert GateHistory().summary() == []


def test_gate_summary_of_agreement() -> None:
    history = GateHistory()
    for epoch, agreed in ((1, None), (1, True), (1, False), (1, True), (1, True), (2, None)):
        history.add(epoch, "model", 80, dropped=False, agreed=agreed)
    other = GateHistory()
    other.load_state_dict(json.loads(json.dumps(history.state_dict())))
    first, second = other.summary()
    assert (first["steps"], first["compared_steps"], first["agreement_share"]) == (5, 4, 0.75)
    assert "agreement_share" not in second
    # Checkpoints from before there were scopes.
    before = {name: values for name, values in history.state_dict().items() if name != "agreed"}
    other.load_state_dict(before)
    other.add(2, "model", 80, dropped=False, agreed=True)
    assert [row.get("compared_steps") for row in other.summary()] == [None, 1]
