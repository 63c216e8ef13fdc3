"""The result file of a benchmark, which is written after every case.

    {"schema": 1, "benchmark": "loss", "preset": "full", "environment": {...}, "rates": {...},
     "cases": [{"case": {...}, "words": ..., "floor_ms": ..., "bound_by": ...,
                "providers": {name: {"p20_ms", "p50_ms", "p80_ms", "samples", "error", "formula",
                                     "peak_bytes", "over_floor", "busy_core"}},
                "left_out": {name: reason}}],
     "growth": [...],
     "noise": {"spread", "load_average", "busy_cores", "cores", "noisy", "why"}}

The suites exits and scaling have sections of their own in place of "cases".
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ...engine.runtime.files import write_whole
from .environment import CPU, Result, environment

SCHEMA = 1
# A result is noisy above this typical (p80 - p20) / p50 ...
NOISY_SPREAD = 0.15
# ... or above this share of the cores that other programs kept busy before the run,
NOISY_BUSY = 0.15
# ... or, if that is unknown, above this load average per core.
NOISY_LOAD = 0.5
# Seconds for which the load by other programs is watched before a run.
WATCH_SECONDS = 0.3


class ResultFile:
    """A result that grows case by case; `save` replaces the file as a whole."""

    def __init__(
        self, path: Path, benchmark: str, preset: str, device: torch.device = CPU, **more: Any
    ) -> None:
        self.path = path
        self.result: Result = {
            "schema": SCHEMA,
            "benchmark": benchmark,
            "preset": preset,
            "environment": environment(device) | {"busy_cores": busy_cores()},
            **more,
        }

    def save(self) -> None:
        self.result["noise"] = noise(self.result)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps(self.result, indent=2) + "\n")


def noise(result: Result) -> Result:
    """Spread of a result's times and load by other programs; "why" says what makes it noisy."""
    spreads = [spread(times) for _, times in timings(result)]
    load = list(result["environment"]["load_average"])
    cores = result["environment"]["cores"] or 1
    typical = statistics.median(spreads) if spreads else 0.0
    why = []
    if typical > NOISY_SPREAD:
        why.append(f"times scatter by {typical:.0%} (20th to 80th percentile)")
    # The load average also includes this program's own earlier work, such as in `bench all`.
    busy = result["environment"].get("busy_cores")
    if busy is not None and busy > NOISY_BUSY * cores:
        why.append(f"others kept {busy:.1f} of {cores} cores busy before the run")
    elif busy is None and load[0] > NOISY_LOAD * cores:
        why.append(f"load average {load[0]:.1f} on {cores} cores before the run")
    return {
        "spread": typical, "load_average": load, "busy_cores": busy, "cores": cores,
        "noisy": bool(why), "why": why,
    }  # fmt: skip


def busy_cores() -> float | None:
    """Number of cores that other programs keep busy; None if Linux does not report it."""
    counts = Path("/proc/stat")
    if not counts.is_file():
        return None
    before = _idle_seconds(counts)
    start = time.perf_counter()
    time.sleep(WATCH_SECONDS)
    idle = (_idle_seconds(counts) - before) / (time.perf_counter() - start)
    return max(0.0, (os.cpu_count() or 1) - idle)


def _idle_seconds(counts: Path) -> float:
    """Seconds since boot, summed over the cores, in which they were idle or waited for a disk."""
    fields = counts.read_text(encoding="ascii").partition("\n")[0].split()
    return (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")


def spread(times: Result) -> float:
    """(p80 - p20) / p50."""
    return (times["p80_ms"] - times["p20_ms"]) / times["p50_ms"]


def timings(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Result]]:
    """Every time in a result with its path: the case in words, then the provider's name."""
    if isinstance(value, dict):
        if "p50_ms" in value:
            yield path, value
            return
        for key, inner in value.items():
            yield from timings(inner, path if key in _SILENT else (*path, str(key)))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            name = inner.get("words", str(index)) if isinstance(inner, dict) else str(index)
            yield from timings(inner, (*path, str(name)))


# Keys that are left out of the path.
_SILENT = {"cases", "providers", "times", "points"}


def read_result(path: Path) -> Result:
    """Read a result file; ValueError for other files and other schemas."""
    if not path.is_file():
        raise ValueError(
            f"{str(path)!r} does not exist: name a JSON file that fusedacl bench wrote."
        )
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not a JSON file: {error}") from None
    if not isinstance(result, dict) or "environment" not in result:
        raise ValueError(f"{str(path)!r} is not a file that fusedacl bench wrote.")
    schema = result.get("schema", 0)
    if schema != SCHEMA:
        raise ValueError(
            f"{str(path)!r} has schema {schema}, this version reads schema {SCHEMA}: measure it "
            "again with this version (fusedacl bench), or compare with the version that wrote it."
        )
    return result
