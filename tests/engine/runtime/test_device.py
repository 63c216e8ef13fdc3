"""Devices and dtypes."""

from __future__ import annotations

import pytest
import torch
from fusedacl.engine.runtime.device import autocast, choose_device, choose_dtype

CPU = torch.device("cpu")


def test_dtype_of_products_under_autocast() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        fp16, bf16 = dtype == torch.float16, dtype == torch.bfloat16
        assert choose_dtype(CPU, fp16=fp16, bf16=bf16) == dtype
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
