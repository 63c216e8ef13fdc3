"""The floor model against figures worked out by hand, and the check that nothing beats it."""

from __future__ import annotations

import pytest
import torch
from fusedacl.benchmarks.floors import loss_and_gate as floors
from fusedacl.benchmarks.floors.loss_and_gate import (
    BERT,
    combine_floor,
    dot_norm_floor,
    loss_floor,
    num_elements,
    page,
)
from fusedacl.benchmarks.floors.rates import CHIPS

RATES = {chip.name: chip.rates() for chip in CHIPS}
V100, H200 = RATES["V100 SXM2"], RATES["H200 SXM"]


def test_bert_has_as_many_parameters_as_published() -> None:
    # transformers' BertModel with its pooler.
    assert {name: (len(shapes), num_elements(shapes)) for name, shapes in BERT.items()} == {
        "BERT-base": (199, 109_482_240),
        "BERT-large": (391, 335_141_888),
    }


def test_the_angle_check_reads_both_lists_once() -> None:
    """BERT-base in float32: 0.97 ms on a V100, 0.2 ms on an H200."""
    count = num_elements(BERT["BERT-base"])
    assert dot_norm_floor(V100, count, 4) == pytest.approx(0.97e-3, rel=0.05)
    # One digit is given: 0.18 ms.
    assert round(dot_norm_floor(H200, count, 4) * 1e3, 1) == 0.2
    assert dot_norm_floor(V100, count, 2) == pytest.approx(0.97e-3 / 2, rel=0.05)
    assert combine_floor(V100, count, 4) == pytest.approx(1.5 * dot_norm_floor(V100, count, 4))


def test_exp_binds_narrow_rows_on_a_fast_matrix_unit() -> None:
    """H200: 16 exp and 4096 FLOP a clock and multiprocessor, 2 d FLOP for one exp forward."""
    for width, forward, backward in (
        (64, "exp", "matrix unit"),
        (128, "matrix unit", "matrix unit"),
        (32, "exp", "exp"),
    ):
        floor = loss_floor(H200, 16384, width, torch.float16)
        assert floor is not None
        assert (floor.forward.bound_by, floor.backward.bound_by) == (forward, backward)
    floor = loss_floor(H200, 65536, 64, torch.bfloat16)
    assert floor is not None
    pairs, clocks = 65536**2, 132 * 1.98e9
    assert floor.forward.seconds == pytest.approx(pairs / 16 / clocks)
    assert floor.backward.seconds == pytest.approx(4 * pairs * 64 / 989.4e12)
    assert floor.memory == pytest.approx(65536 * 64 * (3 * 2 + 4) / 4.8e12)
    assert floor.seconds == pytest.approx(floor.forward.seconds + floor.backward.seconds)


def test_the_triangle_halves_the_forward_pass() -> None:
    rows, triangle = (
        loss_floor(V100, 16384, 256, torch.float16, algorithm) for algorithm in floors.ALGORITHMS
    )
    assert rows is not None and triangle is not None
    assert triangle.forward.seconds == pytest.approx(rows.forward.seconds / 2)
    assert triangle.backward == rows.backward


def test_memory_binds_a_batch_of_few_rows() -> None:
    floor = loss_floor(V100, 16, 64, torch.float16)
    assert floor is not None
    assert floor.seconds == floor.memory


def test_float32_takes_the_better_of_the_two_units() -> None:
    assert V100.flops[torch.float32] == 15.7e12
    assert RATES["A100 SXM 80GB"].flops[torch.float32] == 156e12 / 3
    assert RATES["RTX 4090"].flops[torch.float32] == 82.6e12


def test_a_chip_without_bfloat16_has_no_floor_for_it() -> None:
    assert loss_floor(V100, 16384, 64, torch.bfloat16) is None


def test_vendors_rates_agree_with_each_other() -> None:
    """float32 by the clock: 128 multiply-adds a multiprocessor, 64 on V100, T4 and A100."""
    for chip in CHIPS:
        lanes = 64 if chip.name.startswith(("V100", "T4", "A100")) else 128
        by_clock = 2e-3 * lanes * chip.num_multiprocessors * chip.clock_ghz
        assert by_clock == pytest.approx(chip.float32_tflops, rel=0.01)


def test_page() -> None:
    plain, markdown = (page([V100, H200], markdown=markdown) for markdown in (False, True))
    assert "V100 SXM2  BERT-base     fp32   109,482,240  0.973" in plain
    assert "| H200 SXM | fp16 | 65536 | 64 |" in markdown
    assert "| --- |" in markdown and "| --- |" not in plain


def test_measured_rates_have_the_table_s_form(monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert "measured" in page([found], markdown=True)


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
