"""Machine names, timing in turns, and measurements that need a GPU."""

from __future__ import annotations

import os
from collections import Counter
from functools import partial

import pytest
import torch
from fusedacl.benchmarks.measuring import clock as measure
from fusedacl.benchmarks.measuring import environment
from fusedacl.benchmarks.measuring.clock import interleave_on, launches
from fusedacl.benchmarks.measuring.environment import machine_name
from fusedacl.benchmarks.measuring.memory import extra_device_memory

CPU = torch.device("cpu")


def test_a_gpu_gives_its_results_their_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200 (x)")
    assert machine_name(torch.device("cuda")) == "nvidia-h200-x"
    # Results of the CPU keep the CPU's name.
    assert machine_name() == machine_name(CPU) != "nvidia-h200-x"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert machine_name().endswith(f"-avx512-{os.cpu_count()}core")


def test_fast_calls_are_repeated_and_slow_ones_get_fewer_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A sample takes 20 ms of a fast call, 1 s of the slow one."""
    calls = Counter[str]()
    clock = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    def call(name: str, seconds: float) -> None:
        calls[name] += 1
        clock[0] += seconds

    both = {"fast": partial(call, "fast", 0.001), "slow": partial(call, "slow", 1.0)}
    times = interleave_on(CPU, both, rounds=3, sample_seconds=0.02)
    # Three calls before the first round, then three samples.
    assert calls == {"fast": 3 + 3 * 20, "slow": 3 + 3}
    assert times["fast"]["p50_ms"] == pytest.approx(1)
    for rounds, seconds, samples in ((15, 5.2, 5), (15, 1.0, measure.MIN_ROUNDS), (1, 5.2, 1)):
        times = interleave_on(CPU, both, rounds=rounds, all_seconds=seconds)
        assert {found["samples"] for found in times.values()} == {samples}


def test_gpu_measurements_are_absent_on_the_cpu() -> None:
    assert extra_device_memory(lambda: None, CPU) is None
    assert launches(lambda: None, CPU) is None
    assert "gpu" not in environment.environment()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_on_a_gpu() -> None:
    device = torch.device("cuda")
    x = torch.ones(2**20, device=device)
    assert extra_device_memory(lambda: x + 1, device) == 4 * 2**20
    names = launches(lambda: (x + 1) * 2, device)
    assert names is not None and len(names) == 2
    found = environment.environment(device)
    assert found["gpu"] == torch.cuda.get_device_name(device)
    assert found["driver"][0].isdigit()
