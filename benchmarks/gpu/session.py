"""Commands one after another, each with a time box; what is done stays, whatever happens next."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...engine.runtime.text import text_table
from ..measuring.environment import Result
from ..measuring.result_file import ResultFile

# A part that would have less time than this is not started.
LEAST_SECONDS = 5.0
# Between the request to stop and the end of a part.
GRACE_SECONDS = 3.0
# In which a GPU answers if it still can.
ANSWER_SECONDS = 20.0
# Last lines of a part's output that its record keeps.
TAIL_LINES = 6
DONE, FAILED, CUT, RUNNING = "done", "failed", "cut off", "running"
NOT_STARTED = "not started"
ANSWER = "import torch; torch.ones(1, device='cuda').sum().item()"


@dataclass(frozen=True)
class Part:
    """A command, and the seconds that it may take beside what earlier parts have left over.

    environment: variables that are set for it.
    """

    name: str
    title: str
    seconds: float
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


# Runs a part for at most so many seconds with its output in a file; returns status and reason.
Runner = Callable[[Part, float, Path], tuple[str, str]]


def run_session(
    parts: Sequence[Part],
    budget: float,
    file: ResultFile,
    *,
    run: Runner,
    answers: Callable[[], bool],
    clock: Callable[[], float] = time.monotonic,
) -> bool:
    """Run the parts in order for `budget` seconds in all; return whether all were done.

    The file is saved before and after each part, so that a machine that is lost keeps the record of
    what was done; the parts write their results themselves. answers: whether the device still
    works, asked after a part that was not done; if it does not, nothing else is started.
    """
    directory, start, deadline = file.path.parent, clock(), 0.0
    records = file.result["parts"] = [
        {
            "name": part.name, "title": part.title, "status": NOT_STARTED, "why": "",
            "seconds": 0.0, "limit": 0.0, "tail": [],
        }
        for part in parts
    ]  # fmt: skip
    lost = ""
    for part, record in zip(parts, records, strict=True):
        deadline += part.seconds
        begin = clock() - start
        limit = min(deadline, budget) - begin
        if lost or limit < LEAST_SECONDS:
            record["why"] = lost or f"the budget of {budget:.0f} s is spent"
            continue
        record |= {"status": RUNNING, "limit": limit, "why": "nothing was heard of it again"}
        file.save()
        print(f"\n{part.title}: at most {limit:.0f} s", flush=True)
        log = directory / f"{part.name}.log"
        status, why = run(part, limit, log)
        record |= {
            "status": status, "why": why, "seconds": clock() - start - begin, "tail": tail(log),
        }  # fmt: skip
        file.save()
        print(*(f"  {line}" for line in record["tail"]), sep="\n")
        print(f"  {part.name}: {status} {why}".rstrip(), flush=True)
        if status != DONE and not answers():
            lost = "the device does not answer any more"
    file.save()
    print("\n" + summary(file.result))
    return all(record["status"] == DONE for record in records)


def summary(result: Result) -> str:
    rows = [
        [part["name"], part["status"], f"{part['seconds']:.0f} s", part["why"]]
        for part in result["parts"]
    ]
    return text_table(["part", "status", "took", "why"], rows)


def tail(log: Path) -> list[str]:
    if not log.is_file():
        return []
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line[:200] for line in lines if line.strip()][-TAIL_LINES:]


def run_part(part: Part, limit: float, log: Path) -> tuple[str, str]:
    """Run the command in a process group of its own, which ends with it or at its limit."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            part.command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env={**os.environ, **part.environment}, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            return CUT, f"after {limit:.0f} s; what it had written stays"
        finally:
            end(process)
    return (DONE, "") if status == 0 else (FAILED, f"exit status {status}, see {log.name}")


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it has started, with a request first: files are closed then."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        # A process that waits for a lost device may outlive both.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE_SECONDS)


def gpu_answers() -> bool:
    """Ask in another process: a failed call spoils CUDA for its own."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", ANSWER], timeout=ANSWER_SECONDS, capture_output=True, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
