"""Short training runs on the tiny data of conftest.py, the files that they leave, and texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from fusedacl.engine import MultiExitForSequenceClassification, TrainingConfig, train
from fusedacl.engine.data.batching import EncodedSplit
from fusedacl.engine.model.saved import load_tokenizer
from fusedacl.engine.training.trainer import Trainer
from torch import Tensor

# Of a random BERT-like encoder.
BERT_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 60,
    "max_position_embeddings": 40,
}


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


def flags(options: dict[str, Any]) -> list[str]:
    """The options as words of a command."""
    return [f"--{name}={value}" for name, value in options.items()]


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


def save_model(
    model: MultiExitForSequenceClassification, tokenizer_of: Path, directory: Path
) -> Path:
    """Save a model with the tokenizer of another one, and return the directory."""
    model.save_pretrained(directory)
    load_tokenizer(str(tokenizer_of)).save_pretrained(directory)
    return directory


def random_texts(number: int, longest: int) -> EncodedSplit:
    """Texts of random lengths from 2 to `longest` - 1 tokens, with random labels of 3 classes."""
    random = np.random.default_rng(3)
    lengths = random.integers(2, longest, number)
    return EncodedSplit(
        tokens=random.integers(5, 60, lengths.sum()).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        token_types=None,
        labels=torch.from_numpy(random.integers(0, 3, number)),
        num_truncated=0,
        max_length=longest,
    )
