"""Devices, dtypes and the loss scale."""

from __future__ import annotations

import pytest
import torch
from fusedacl.engine.backends.loss_scaling import LossScaler
from fusedacl.engine.runtime.device import autocast, choose_device, choose_dtype

CPU = torch.device("cpu")


def test_dtype_of_products_under_autocast() -> None:
    for options, dtype in (
        ({"fp16": False, "bf16": False}, torch.float32),
        ({"fp16": True, "bf16": False}, torch.float16),
        ({"fp16": False, "bf16": True}, torch.bfloat16),
    ):
        assert choose_dtype(CPU, **options) == dtype
        with autocast(CPU, dtype):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_bf16_is_refused_on_a_gpu_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    with pytest.raises(ValueError, match="Tesla V100 has no bfloat16 arithmetic. Use fp16"):
        choose_dtype(torch.device("cuda"), fp16=False, bf16=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu() -> None:
    assert choose_device("auto") == CPU
    with pytest.raises(ValueError, match="torch sees no GPU here. Use device=cpu"):
        choose_device("cuda")


def test_scale_halves_on_overflow_and_doubles_after_good_steps() -> None:
    scaler = LossScaler(enabled=True, initial_scale=16.0, growth_interval=3)
    scales = []
    for overflow in (True, False, False, True, False, False, False, False):
        scaler.update(overflow)
        scales.append(scaler.scale)
    assert scales == [8, 8, 8, 4, 4, 4, 8, 8]


def test_overflow_at_every_scale_is_an_error() -> None:
    scaler = LossScaler(enabled=True, initial_scale=2.0**-13)
    scaler.update(overflow=True)
    with pytest.raises(FloatingPointError, match="overflows float16 even at a loss scale"):
        scaler.update(overflow=True)


def test_scaler_state_and_disabled_scaler() -> None:
    scaler = LossScaler(enabled=True, initial_scale=16.0, growth_interval=3)
    scaler.update(False)
    other = LossScaler(enabled=True, growth_interval=3)
    other.load_state_dict(scaler.state_dict())
    for each in (scaler, other):
        each.update(False)
        each.update(False)
    assert scaler.scale == other.scale == 32
    disabled = LossScaler(enabled=False)
    disabled.update(overflow=True)
    assert disabled.scale == 1
