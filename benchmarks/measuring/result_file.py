"""The file that a benchmark leaves: one schema, written after every case, refused when foreign.

    {"schema": 1, "benchmark": "loss", "preset": "full", "environment": {...}, "rates": {...},
     "cases": [{"case": {...}, "words": ..., "floor_ms": ..., "bound_by": ...,
                "providers": {name: {"p20_ms", "p50_ms", "p80_ms", "samples", "error", "formula",
                                     "peak_bytes", "over_floor"}},
                "left_out": {name: reason}}],
     "growth": [...],
     "noise": {"spread", "load_average", "busy_cores", "cores", "noisy", "why"}}

Suites that came before it (exits, scaling, step) have sections of their own in place of cases.
Files without "schema" are older still; only the performance page reads them.
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
# The typical (p80 - p20) / p50 from which a result is marked.
NOISY_SPREAD = 0.15
# Of the cores, what others kept busy before the run; by the load average where that is not told.
NOISY_BUSY = 0.15
NOISY_LOAD = 0.5
# For so long this process waits and sees what others do.
WATCH_SECONDS = 0.3


class ResultFile:
    """A result in the making; `save` leaves a whole file each time."""

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
    """How far the times of a result scatter, and what else ran; in words where that is too much."""
    spreads = [spread(times) for _, times in timings(result)]
    load = list(result["environment"]["load_average"])
    cores = result["environment"]["cores"] or 1
    typical = statistics.median(spreads) if spreads else 0.0
    why = []
    if typical > NOISY_SPREAD:
        why.append(f"times scatter by {typical:.0%} (20th to 80th percentile)")
    # The load average also remembers what this program did before, in `bench all` say.
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
    """Cores that others keep busy while this process waits; None where Linux's count is missing."""
    counts = Path("/proc/stat")
    if not counts.is_file():
        return None
    before = _idle_seconds(counts)
    start = time.perf_counter()
    time.sleep(WATCH_SECONDS)
    idle = (_idle_seconds(counts) - before) / (time.perf_counter() - start)
    return max(0.0, (os.cpu_count() or 1) - idle)


def _idle_seconds(counts: Path) -> float:
    """Of all cores together since the machine started: idle, and waiting for a disk."""
    fields = counts.read_text(encoding="ascii").partition("\n")[0].split()
    return (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")


def spread(times: Result) -> float:
    """(p80 - p20) / p50."""
    return (times["p80_ms"] - times["p20_ms"]) / times["p50_ms"]


def timings(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Result]]:
    """Every time in a result with what it is of: the case in words, the provider's name."""
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


# Names that say nothing beside what is inside them.
_SILENT = {"cases", "providers", "times", "points"}


def _known(rate: float) -> float | None:
    """A rate that took no part in the rounds is infinite, which JSON has no word for."""
    return None if rate == float("inf") else rate


def read_result(path: Path) -> Result:
    """A result of this schema.

    Raises:
        ValueError: no such file, no JSON, or another version's file, with what would do.
    """
    result = read_any(path)
    schema = result.get("schema", 0)
    if schema != SCHEMA:
        raise ValueError(
            f"{str(path)!r} has schema {schema}, this version reads schema {SCHEMA}: measure it "
            "again with this version (fusedacl bench), or compare with the version that wrote it."
        )
    return result


def read_any(path: Path) -> Result:
    """As `read_result`, and files without a schema, which the page reads as version 0."""
    if not path.is_file():
        raise ValueError(
            f"{str(path)!r} does not exist: name a JSON file that fusedacl bench left."
        )
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is no JSON file: {error}") from None
    if not isinstance(result, dict) or "environment" not in result:
        raise ValueError(f"{str(path)!r} is not a file that fusedacl bench left.")
    return result


def default_directory(machine: str, preset: str) -> Path:
    """Of a full run in a checkout, beside the committed results; else under runs/."""
    committed = Path(__file__).parents[1] / "results"
    if preset == "full" and committed.is_dir() and os.access(committed, os.W_OK):
        return committed / machine
    return Path("runs") / "bench" / machine


def write(result: Result, path: Path, device: torch.device = CPU) -> None:
    """Writes a full run's result with its environment, as a file of `result.SCHEMA`."""
    from .result_file import ResultFile

    file = ResultFile(path, path.stem, "full", device, **result)
    file.save()
    print(f"written: {path}")
