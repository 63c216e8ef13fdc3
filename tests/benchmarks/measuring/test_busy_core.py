import subprocess
import time
from typing import Any

import pytest
from fusedacl.benchmarks.measuring import busy_core
from fusedacl.benchmarks.measuring.times_table import times_table


def test_calls_are_timed_one_by_one_while_a_process_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []

    class Recorded(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(busy_core.subprocess, "Popen", Recorded)
    monkeypatch.setattr(busy_core, "TURN_SECONDS", 0.02)
    running: list[bool] = []

    def call() -> None:
        running.append(started[0].poll() is None)
        time.sleep(0.004)

    idle = {name: {"p20_ms": 4.0, "p50_ms": 4.0, "p80_ms": 4.0} for name in ("one", "other")}
    found = busy_core.times_beside_a_busy_core(
        {"one": call, "other": call}, idle, rounds=3, all_seconds=60
    )
    assert len(started) == 1 and started[0].poll() is not None
    assert running == [True] * 30
    for name, entry in found.items():
        assert entry["samples"] == 15
        assert 4 <= entry["p50_ms"] <= entry["p90_ms"]
        assert entry["slowdown"] == pytest.approx(entry["p50_ms"] / 4)
        assert entry["p90_slowdown"] == pytest.approx(entry["p90_ms"] / 4)
        idle[name]["busy_core"] = entry
    words = f"{found['one']['slowdown']:.2f} ({found['one']['p90_slowdown']:.2f})"
    assert words in times_table(idle)


def test_the_process_ends_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="broken"), busy_core.one_busy_core() as process:
        raise RuntimeError("broken")
    assert process.poll() is not None
