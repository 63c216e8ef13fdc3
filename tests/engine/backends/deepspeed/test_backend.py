"""Refusals of the backend before DeepSpeed starts."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fusedacl.engine import TrainingConfig

pytest.importorskip("deepspeed")

import deepspeed.accelerator
from fusedacl.engine.backends.deepspeed import backend
from torch import nn


def test_the_device_of_deepspeed_is_that_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = SimpleNamespace(device_name=lambda: "cuda")
    monkeypatch.setattr(deepspeed.accelerator, "get_accelerator", lambda: chosen)
    with pytest.raises(ValueError, match="device=cpu: .* on cuda here. Set .*DS_ACCELERATOR=cpu"):
        backend._initialize({}, torch.device("cpu"))


def test_impl_is_for_the_device_of_the_reduced_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    model: Any = nn.Linear(2, 2)

    def choose(impl: str, device: torch.device) -> None:
        chosen.append(device)
        raise ValueError("stop")

    monkeypatch.setattr(backend, "choose", choose)
    for zero in ({"stage": 2}, {"stage": 2, "offload_optimizer": {"device": "cpu"}}):
        config = TrainingConfig.create(task_name="quickstart", output_dir="unused").resolved()
        with pytest.raises(ValueError, match="stop"):
            backend.DeepSpeedBackend(
                model, config, 9, torch.device("cuda"),
                groups={"model": list(model.parameters())}, independent=False, learning_rate=0.1,
                gate_scope="all", deepspeed_config={"zero_optimization": zero},
            )  # fmt: skip
    assert [device.type for device in chosen] == ["cuda", "cpu"]
