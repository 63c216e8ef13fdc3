"""A session on a GPU: time boxes by a fake clock, lost devices, and commands that are sound."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fusedacl.benchmarks import cli
from fusedacl.benchmarks.gpu import __main__ as command
from fusedacl.benchmarks.gpu import session, steps
from fusedacl.benchmarks.gpu.parts import BUDGET, all_parts
from fusedacl.benchmarks.gpu.session import CUT, DONE, FAILED, NOT_STARTED, RUNNING, Part
from fusedacl.benchmarks.measuring.result_file import ResultFile, read_result
from fusedacl.benchmarks.options import BenchConfig, sizes
from fusedacl.engine.runtime.lock import is_running
from fusedacl.kernels import tuning

SECONDS = {"a": 60, "b": 100, "c": 50, "d": 40}
SECONDS = {"a": 60, "b": 100, "c": 50, "d": 40}
PARTS = [Part(name, f"The part {name}", seconds, ()) for name, seconds in SECONDS.items()]


class Rehearsal:
    """A clock that only parts advance; `took` says by how much, unless their limit comes first."""

    def __init__(self, path: Path, **took: float) -> None:
        self.now, self.took = 1000.0, took
        self.limits: dict[str, float] = {}
        self.failing: set[str] = set()
        self.alive = True
        self.path = path

    def clock(self) -> float:
        return self.now

    def run(self, part: Part, limit: float, log: Path) -> tuple[str, str]:
        self.limits[part.name] = limit
        # A machine that is lost now would leave this behind.
        kept = {each["name"]: each["status"] for each in read_result(self.path)["parts"]}
        assert kept[part.name] == RUNNING
        assert all(kept[name] != NOT_STARTED for name in list(self.limits)[:-1])
        log.write_text(f"first\n\nresults of {part.name}\n")
        took = self.took.get(part.name, part.seconds)
        self.now += min(took, limit)
        if part.name in self.failing:
            return FAILED, "exit status 1"
        return (DONE, "") if took <= limit else (CUT, "too long")

    def session(self, budget: float) -> tuple[bool, list[dict[str, Any]]]:
        file = ResultFile(self.path, "session", "test")
        done = session.run_session(
            PARTS, budget, file, run=self.run, answers=lambda: self.alive, clock=self.clock
        )
        assert read_result(self.path)["parts"] == file.result["parts"]
        return done, file.result["parts"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "session.json"


def statuses(records: list[dict[str, Any]]) -> list[str]:
    return [record["status"] for record in records]


def test_time_that_is_left_over_goes_to_later_parts(path: Path) -> None:
    rehearsal = Rehearsal(path, a=10, b=180, c=20)
    done, records = rehearsal.session(250)
    # b is cut where its box and what a left over end.
    assert rehearsal.limits == {"a": 60, "b": 150, "c": 50, "d": 70}
    assert not done and statuses(records) == [DONE, CUT, DONE, DONE]
    assert [record["seconds"] for record in records] == [10, 150, 20, 40]
    assert records[0]["tail"] == ["first", "results of a"]


def test_a_budget_cuts_from_the_end(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rehearsal = Rehearsal(path)
    done, records = rehearsal.session(163)
    assert rehearsal.limits == {"a": 60, "b": 100}
    assert not done and statuses(records) == [DONE, DONE, NOT_STARTED, NOT_STARTED]
    assert records[2]["why"] == "the budget of 163 s is spent"
    assert "The part b: at most 100 s" in capsys.readouterr().out
    done, records = Rehearsal(path).session(250)
    assert done and statuses(records) == [DONE] * 4


def test_a_lost_device_keeps_what_is_done(path: Path) -> None:
    rehearsal = Rehearsal(path)
    rehearsal.failing, rehearsal.alive = {"b"}, False
    done, records = rehearsal.session(250)
    assert not done and statuses(records) == [DONE, FAILED, NOT_STARTED, NOT_STARTED]
    assert records[3]["why"] == "the device does not answer any more"
    # A part that failed alone does not stop the others.
    rehearsal = Rehearsal(path)
    rehearsal.failing = {"b"}
    assert statuses(rehearsal.session(250)[1]) == [DONE, FAILED, DONE, DONE]


def test_a_part_is_ended_with_what_it_has_started(tmp_path: Path) -> None:
    """A command that starts another one, ignores the request to stop, and would last an hour."""
    program = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
print(os.environ["SAID"], child.pid, flush=True)
time.sleep(3600)
"""
    log = tmp_path / "part.log"
    part = Part("part", "", 1, (sys.executable, "-c", program), {"SAID": "results"})
    start = time.monotonic()
    status, why = session.run_part(part, 1.5, log)
    assert status == CUT and "what it had written stays" in why
    assert time.monotonic() - start < 30
    said, pid = log.read_text().split()
    assert said == "results"
    # A killed process takes a moment to end, longer on a busy machine.
    while is_running(int(pid)):
        assert time.monotonic() - start < 60
        time.sleep(0.05)


def test_a_command_that_fails_is_named(tmp_path: Path) -> None:
    for code, found in ((0, (DONE, "")), (3, (FAILED, "exit status 3, see part.log"))):
        part = Part("part", "", 60, (sys.executable, "-c", f"raise SystemExit({code})"))
        assert session.run_part(part, 60, tmp_path / "part.log") == found


def test_the_commands_are_sound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The commands for a GPU: their options are parsed, their tests and scripts exist."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    parts = {part.name: part for part in all_parts(tmp_path)}
    assert list(parts) == ["smoke", "essentials", "loss", "angle", "tuning", "steps"]
    assert sum(part.seconds for part in parts.values()) == BUDGET
    for name in ("loss", "angle"):
        _, module, *arguments = parts[name].command[1:]
        assert (module, arguments.pop(0)) == ("fusedacl.benchmarks", name)
        config = cli._parse(BenchConfig, name, arguments)
        assert config.how.device == "cuda" and config.how.output_dir == str(tmp_path)
        number = {"loss": 8, "angle": 6}[name]
        assert len(cli.CASES[name](sizes(config))) == number
    assert tuning.parse_arguments(parts["tuning"].command[3:]).quick
    assert parts["tuning"].environment["FUSEDACL_CACHE"] == str(tmp_path)
    for test in parts["essentials"].command[8:]:
        file, _, function = test.partition("::")
        assert f"def {function}" in Path(file).read_text()


def test_the_session_needs_a_gpu_or_is_rehearsed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert command.main([]) == 2
    assert "no NVIDIA GPU answers here: " in capsys.readouterr().err
    assert command.main(["--budget", "-1"]) == 2
    assert "--budget is -1" in capsys.readouterr().err


def test_a_rehearsal_and_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real commands on the CPU: the tests' names, tuning's options, steps with and without gate."""
    monkeypatch.setattr(
        command, "all_parts",
        lambda *arguments: [
            part for part in all_parts(*arguments) if part.name in ("essentials", "tuning", "steps")
        ],
    )  # fmt: skip
    directory = tmp_path / "some-gpu"
    assert command.main(["--rehearse", "--output_dir", str(directory)]) == 0
    (case,) = read_result(directory / "steps.json")["cases"]
    assert list(case["providers"]) == list(steps.KINDS)
    assert "def test" not in (directory / "essentials.log").read_text()
    page = tmp_path / "performance.md"
    assert cli.main(["report", str(directory), "--output", str(page)]) == 0
    text = page.read_text()
    assert "| A training step with and without the gate | done |" in text
    assert "| CE + ACL, two and the gate |" in text
    assert cli.main(["report", str(tmp_path / "nothing"), "--output", str(page)]) == 2
