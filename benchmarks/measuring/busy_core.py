"""Times of calls while another process keeps one core busy, as on a shared machine."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np

from .clock import interleaved, seconds
from .environment import Result

# Ends by itself when the process that started it is gone.
BUSY = """
import os, sys
print("running", flush=True)
while os.getppid() == int(sys.argv[1]):
    for _ in range(10**6):
        pass
"""
# What a turn of one call takes at least, and its largest number of samples.
TURN_SECONDS = 0.1
MAX_SAMPLES = 20


@contextlib.contextmanager
def one_busy_core() -> Iterator[subprocess.Popen[bytes]]:
    """Keep one core busy, by a process that ends with the context."""
    command = [sys.executable, "-c", BUSY, str(os.getpid())]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield process
        finally:
            process.kill()


def times_beside_a_busy_core(
    calls: Mapping[str, Callable[[], object]],
    idle: Mapping[str, Result],
    *,
    rounds: int,
    all_seconds: float,
) -> dict[str, Result]:
    """Median and 90th percentile of single calls in turns, and both over the idle median.

    idle: times of the same calls without the other process, which also say how many samples a
    turn has.
    """
    turns, total = {}, 0.0
    for name, call in calls.items():
        one = idle[name]["p50_ms"] / 1e3
        repeats = max(1, min(MAX_SAMPLES, round(TURN_SECONDS / one)))
        total += repeats * one
        turns[name] = partial(_samples, call, repeats)
    # Half of the machine is left, so that a round takes about twice as long.
    rounds = max(3, min(rounds, int(all_seconds / (2 * total))))
    with one_busy_core():
        # The scheduler needs some time to share the cores out.
        time.sleep(TURN_SECONDS)
        found = interleaved(turns, rounds=rounds)
    entries = {}
    for name, samples in found.items():
        p50, p90 = np.percentile(samples, [50, 90]) * 1e3
        alone = idle[name]["p50_ms"]
        entries[name] = {
            "p50_ms": p50, "p90_ms": p90, "samples": len(samples),
            "slowdown": p50 / alone, "p90_slowdown": p90 / alone,
        }  # fmt: skip
    return entries


def _samples(call: Callable[[], object], repeats: int) -> list[float]:
    return [seconds(call) for _ in range(repeats)]
