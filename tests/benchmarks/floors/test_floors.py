"""Floors of the loss and the gate against numbers worked out by hand; measured rates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fusedacl.benchmarks.floors.loss import loss_floor, pass_seconds
from fusedacl.benchmarks.floors.rates import Floor, Rates
from fusedacl.benchmarks.suites.gate.case import BERT_BASE, AngleCase
from fusedacl.benchmarks.suites.gate.suite import SUITE

# NVIDIA's figures; exponentials: 16 per clock and multiprocessor.
V100 = Rates("V100", {torch.float16: 125e12, torch.float32: 15.7e12}, 80 * 16 * 1.53e9, 900e9)
H200 = Rates(
    "H200",
    {torch.float16: 989.4e12, torch.bfloat16: 989.4e12, torch.float32: 164.9e12},
    132 * 16 * 1.98e9,
    4.8e12,
)


def test_the_angle_check_reads_both_lists_once() -> None:
    """BERT-base in float32: 0.97 ms on a V100, 0.2 ms on an H200."""
    case = AngleCase("dot_norm", BERT_BASE)
    on_v100 = SUITE.floor(V100, case).seconds
    assert on_v100 == pytest.approx(0.97e-3, rel=0.05)
    assert round(SUITE.floor(H200, case).seconds * 1e3, 1) == 0.2
    assert SUITE.floor(V100, replace(case, dtype="float16")).seconds == on_v100 / 2
    combined, both = (
        SUITE.floor(V100, replace(case, task=task)).seconds for task in ("combine", "gate")
    )
    assert combined == pytest.approx(1.5 * on_v100)
    assert both == pytest.approx(on_v100 + combined)


def test_exp_binds_narrow_rows_on_a_fast_matrix_unit() -> None:
    """H200: 16 exp and 4096 FLOP per clock and multiprocessor, 2 d FLOP per exp forward."""
    for width, binds in ((64, (False, True)), (128, (True, True)), (32, (False, False))):
        passes = pass_seconds(H200, 16384, width, torch.float16)
        assert tuple(matrix > exponential for matrix, exponential in passes) == binds
    pairs, clocks = 65536**2, 132 * 1.98e9
    forward, backward = pass_seconds(H200, 65536, 64, torch.bfloat16)
    assert max(forward) == pytest.approx(pairs / 2 / 16 / clocks)
    assert max(backward) == pytest.approx(4 * pairs * 64 / 989.4e12)
    floor = loss_floor(H200, 65536, 64, torch.bfloat16)
    assert floor == Floor(max(forward) + max(backward), "exp")


def test_a_cpu_adds_both_units_and_keeps_the_pairs() -> None:
    cpu = Rates("CPU", {torch.float32: 100e9}, 1e9, 10e9, overlaps_units=False)
    floor = loss_floor(cpu, 4096, 64, torch.float32)
    assert floor is not None
    pairs = 4096**2
    assert floor.seconds == pytest.approx(3 * pairs * 64 / 100e9 + pairs / 2 / 1e9)


def test_memory_binds_a_batch_of_few_rows() -> None:
    memory = 16 * 64 * (3 * 2 + 4) / 900e9
    assert loss_floor(V100, 16, 64, torch.float16) == Floor(pytest.approx(memory), "memory")


def test_a_machine_without_bfloat16_has_no_floor_for_it() -> None:
    assert loss_floor(V100, 16384, 64, torch.bfloat16) is None


def test_unknown_rates_are_null_in_json() -> None:
    record = Rates("x", {torch.float32: 2e9}, float("inf"), 3e9).record()
    assert record["gigaflops"] == {"float32": 2.0}
    assert record["giga_exponentials_per_second"] is None
    assert record["gigabytes_per_second"] == 3.0


def test_the_gpu_s_rates_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rates' kernel under Triton's interpreter; the numbers are this CPU's."""
    pytest.importorskip("triton", reason="triton is not installed")
    from fusedacl.benchmarks.floors import gpu as gpu_rates

    monkeypatch.setattr(gpu_rates, "ROUNDS", 1)
    monkeypatch.setattr("fusedacl.benchmarks.measuring.clock.MAX_REPEATS", 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = gpu_rates.measured(
        device, matrix_size=32, num_blocks=2, num_exponentials=3, num_bytes=4096
    )
    assert found.flops.keys() >= {torch.float16, torch.float32}
    assert min(*found.flops.values(), found.exponentials, found.bytes) > 0
    assert "measured" in found.name


def test_the_exponentials_are_computed() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from fusedacl.benchmarks.floors.gpu import BLOCK, exponentials_kernel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = torch.rand(BLOCK, device=device)
    expected = values.clone()
    for _ in range(3):
        expected = torch.exp2(-expected)
    exponentials_kernel[(1,)](values, NUM_EXPONENTIALS=3, BLOCK=BLOCK)
    torch.testing.assert_close(values, expected)
