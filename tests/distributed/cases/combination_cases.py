"""Rank functions of runs whose final model is compared between processes."""

from __future__ import annotations

import hashlib
from typing import Any
from unittest import mock

from fusedacl.engine import TrainingConfig
from fusedacl.engine.training import run
from fusedacl.engine.training.trainer import Trainer


def trained_model(rank: int, options: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The results of a run, and the SHA-256 of the weights that this process ends with."""
    trainers: list[Trainer] = []

    def new_trainer(*arguments: Any) -> Trainer:
        trainers.append(Trainer(*arguments))
        return trainers[-1]

    with mock.patch.object(run, "Trainer", new_trainer):
        results = run.train(TrainingConfig.create(**options))
    digest = hashlib.sha256()
    for name, value in sorted(trainers[0].model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return results, digest.hexdigest()
