import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from fusedacl.kernels import supcon_loss
from fusedacl.kernels.contrastive import dispatch, reference
from fusedacl.kernels.contrastive.dispatch import Workload, choose, explain
from fusedacl.kernels.contrastive.gpu import large_batches, small_batches, tiles
from fusedacl.kernels.contrastive.tiled import loss as tiled
from fusedacl.kernels.support import machine

CPU = torch.device("cpu")
GPU = torch.device("cuda")


@pytest.fixture
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def pretend(monkeypatch: pytest.MonkeyPatch, capability: int | None) -> None:
    """Pretend that the machine has a GPU of this compute capability."""
    for module in (dispatch, machine):
        monkeypatch.setattr(module, "capability", lambda device: capability)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_auto_on_the_cpu_is_tiled_wherever_it_can_run(dtype: torch.dtype) -> None:
    for num_rows in (1, 1000):
        for temperature, name in ((0.5, "tiled"), (1 / 689, "tiled"), (1 / 691, "reference")):
            assert choose("auto", Workload(CPU, dtype, temperature, num_rows)) == name


def test_auto_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice depends on rows, capability, dtype and temperature."""
    for capability, num_rows, dtype, temperature, name in (
        (90, 256, torch.float16, 0.5, "supcon_small"),
        (90, 257, torch.float16, 0.5, "supcon_fused"),
        (80, 257, torch.float32, 0.5, "supcon_fused"),
        (70, 256, torch.float16, 0.5, "supcon_small"),
        (70, 257, torch.float16, 0.5, "tiled"),
        (75, 5000, torch.float16, 0.5, "tiled"),
        (90, 100, torch.float64, 0.5, "tiled"),
        (90, 5000, torch.float16, 0.02, "tiled"),
        (90, 5000, torch.float16, 0.001, "reference"),
    ):
        pretend(monkeypatch, capability)
        assert choose("auto", Workload(GPU, dtype, temperature, num_rows)) == name


def test_wide_rows_of_16_bits_are_tiled_by_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for few rows, not where "tiled" computes in float32, not without a choice."""
    pretend(monkeypatch, 90)
    many = {"num_rows": 2048, "width": 257}
    for changes, name in (
        ({}, "tiled"),
        ({"dtype": torch.bfloat16, "temperature": 0.05, "width": 1024}, "tiled"),
        ({"width": 256}, "supcon_fused"),
        ({"num_rows": 2047}, "supcon_fused"),
        ({"num_rows": 10, "num_ranks": 2}, "tiled"),
        ({"dtype": torch.float32}, "supcon_fused"),
        ({"temperature": 0.0499}, "supcon_fused"),
    ):
        workload = Workload(**{"device": GPU, "dtype": torch.float16, **many, **changes})
        assert choose("auto", workload) == name, changes
        assert choose("triton", workload) == "supcon_fused"
    text = explain(Workload(GPU, torch.float16, **many))
    assert "tiled with one tile of at most 32 MiB" in text
    assert "supcon_fused is not taken: by the model, not by measurement" in text


def test_what_was_measured_here_overrides_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 90)
    known = {64: "tiled", 128: "supcon_fused", 768: "supcon_fused"}
    measured = {width: known.get(width) for width in tiles.PADDED_WIDTHS}
    monkeypatch.setattr(tiles, "measured_choices", lambda *kind: tuple(measured.items()))
    for width, name in (
        (32, "supcon_fused"), (64, "tiled"), (65, "supcon_fused"), (512, "tiled"),
        (513, "supcon_fused"), (769, "tiled"),
    ):  # fmt: skip
        workload = Workload(GPU, torch.float16, num_rows=4096, width=width)
        assert choose("auto", workload) == name, width
    assert "tiled was faster, measured on this GPU" in explain(replace(workload, width=64))


def test_one_launch_never_takes_rows_of_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 90)
    workload = Workload(GPU, torch.float16, num_rows=34, num_ranks=2)
    assert choose("auto", workload) == choose("triton", workload) == "supcon_fused"
    assert "34 rows on each of 2 ranks" in explain(workload)


def test_triton_by_size_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 90)
    assert choose("triton", Workload(GPU, num_rows=256)) == "supcon_small"
    assert choose("triton", Workload(GPU, num_rows=257)) == "supcon_fused"
    few, many = ({"num_rows": num_rows} for num_rows in (20, 2000))
    for workload, message in (
        (Workload(GPU, torch.float64, **few), "float64.*impl='tiled'"),
        (Workload(GPU, torch.float64, **many), "float64.*impl='tiled'"),
        (Workload(GPU, temperature=0.0229, **many), "temperature 0.0229 is below 0.023.*'tiled'"),
        (Workload(GPU, temperature=0.0229, **few), "temperature 0.0229 is below 0.023.*'tiled'"),
        (Workload(GPU, width=1025, **many), "width 1025 is above 1024.*impl='tiled'"),
    ):
        with pytest.raises(ValueError, match=f"impl='triton' cannot run: .*{message}"):
            choose("triton", workload)
    pretend(monkeypatch, 75)
    with pytest.raises(ValueError, match="7.5 has no matrix unit.*impl='tiled'"):
        choose("triton", Workload(GPU, **many))
    assert large_batches.obstacle(1024, torch.bfloat16, 0.023, 80) is None
    assert small_batches.obstacle(64, torch.float16, 0.023, 70) is None


def test_the_choice_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def record(owner: Any, attribute: str, name: str) -> None:
        monkeypatch.setattr(owner, attribute, lambda _: called.append(name) or torch.zeros(()))

    record(reference, "contrastive_loss", "reference")
    for module in (tiled, small_batches, large_batches):
        record(module.implementation, "loss", module.__name__.rpartition(".")[2])
    for impl, temperature, small_rows in (
        ("auto", 0.5, 256), ("auto", 1e-3, 256), ("reference", 0.5, 256), ("tiled", 0.5, 256),
        ("triton", 0.5, 4), ("triton", 0.5, 3),
    ):  # fmt: skip
        monkeypatch.setattr(dispatch, "SMALL_ROWS", small_rows)
        supcon_loss(torch.randn(4, 3), torch.zeros(4).long(), impl=impl, temperature=temperature)
    assert called == [
        "loss", "reference", "reference", "loss", "small_batches", "large_batches",
    ]  # fmt: skip


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    dispatch.log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="fusedacl.kernels.contrastive.dispatch"):
        for _ in range(3):
            supcon_loss(torch.randn(4, 3), torch.zeros(4).long())
            supcon_loss(torch.randn(4, 3), torch.zeros(4).long(), temperature=1e-3)
    assert len(caplog.messages) == 2
    assert "impl=auto, torch.float32 embeddings on cpu: tiled" in caplog.messages[0]
    assert "reference (tiled cannot run: temperature 0.001 is below" in caplog.messages[1]


def test_explains_in_words(monkeypatch: pytest.MonkeyPatch, no_interpreter: None) -> None:
    text = explain(Workload(CPU, torch.bfloat16))
    assert "on cpu, any number of rows, torch.bfloat16 embeddings: tiled (" in text
    assert "computed in torch.float32" in text
    compiled = tiled.cpu_loop.compiled_loop() is not None
    assert ("up to 64 MiB for pairs (pair_memory)" if compiled else "PyTorch operations") in text
    monkeypatch.setattr(tiled.cpu_loop, "compiled_loop", lambda: None)
    assert "when fusedacl is installed on a machine with a C compiler" in explain(Workload(CPU))
    assert "triton cannot run: the tensors are on the cpu" in text
    assert "computed in torch.float64" in explain(Workload(CPU, temperature=0.01))
    text = explain(Workload(CPU, temperature=0.001))
    assert "reference, computed in torch.float32; tiled cannot run: temperature 0.001" in text
    pretend(monkeypatch, 70)
    text = explain(Workload(GPU, torch.float16, num_rows=4096))
    assert "on cuda, 4096 rows, torch.float16 embeddings: tiled" in text
    assert "with one tile of at most 32 MiB" in text
    assert "supcon_fused cannot run: " in text
