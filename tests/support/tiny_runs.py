"""Short training runs on the tiny data of conftest.py, and the files that they leave."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from fusedacl.engine import TrainingConfig, train
from fusedacl.engine.training.trainer import Trainer
from torch import Tensor


def options_of(encoder: Path, data: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    """Options of a run on the task `opinions`."""
    return {
        "task_name": "opinions",
        "data_dir": str(data),
        "model_name_or_path": str(encoder),
        "max_seq_length": 16,
        "output_dir": str(output_dir),
        "disable_tqdm": True,
        **changes,
    }


def run(options: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Train and return the results."""
    return train(TrainingConfig.create(**{**options, **changes}))


def records(
    directory: str | Path, split: str | None = None, *, with_speed: bool = False
) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, of one split or all; the measured speed is left out by default."""
    lines = map(json.loads, (Path(directory) / "metrics.jsonl").read_text().splitlines())
    chosen = [line for line in lines if split in (None, line["split"])]
    if not with_speed:
        for line in chosen:
            line.pop("samples_per_second", None)
    return chosen


def at_step(
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    action: Callable[[Trainer], Any],
    *,
    before: bool = False,
) -> None:
    """Make a run call `action` with its trainer, before or after it takes a step."""
    trained = Trainer._train_step

    def step_and_act(trainer: Trainer, *arguments: Any) -> None:
        if before and trainer.step == step - 1:
            action(trainer)
        trained(trainer, *arguments)
        if not before and trainer.step == step:
            action(trainer)

    monkeypatch.setattr(Trainer, "_train_step", step_and_act)


def weights(directory: str | Path) -> dict[str, Tensor]:
    """Tensors of the final model or of a checkpoint."""
    return safetensors.torch.load_file(Path(directory) / "model.safetensors")
