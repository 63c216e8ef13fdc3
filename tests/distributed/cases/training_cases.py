"""Rank functions that do whole runs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

# Before deepspeed looks for one: these ranks compute on the CPU, also where there is a GPU.
os.environ["DS_ACCELERATOR"] = "cpu"

import pytest
import torch
from fusedacl.engine import TrainingConfig
from fusedacl.engine.backends.deepspeed.resharding import places
from fusedacl.engine.runtime.signals import Interrupted
from fusedacl.engine.training import builder, trainer
from fusedacl.engine.training.builder import build_run
from fusedacl.engine.training.run import train
from fusedacl.engine.training.trainer import Trainer

# torch warns about functions that deepspeed calls.
warnings.filterwarnings("ignore", category=FutureWarning)


def trained(rank: int, options: dict[str, Any]) -> dict[str, Any]:
    """The metrics of a run."""
    return train(TrainingConfig.create(**options))["metrics"]


def linear_is_torchs(rank: int) -> bool:
    """True if a run has left torch's own linear function in its process."""
    return torch.nn.functional.linear.__module__.startswith("torch")


def stopped(rank: int, options: dict[str, Any], step: int, told: int = 1) -> tuple[int, str]:
    """The exit code and the checkpoint's name of a run that one rank alone is told to stop."""
    original = Trainer._train_step

    def interrupted(self: Trainer, *arguments: Any) -> None:
        original(self, *arguments)
        if rank == told and self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    Trainer._train_step = interrupted  # type: ignore[method-assign]
    try:
        train(TrainingConfig.create(**options))
    except Interrupted as stop:
        return stop.exit_code, str(stop)
    finally:
        Trainer._train_step = original  # type: ignore[method-assign]
    return 0, "was not stopped"


def held(rank: int, options: dict[str, Any]) -> list[tuple[str, int, list[Any]]]:
    """Return the optimizer's parts on this process, of a resumed run: name, start, values.

    The values are the master weights, the moments and the number of steps.
    """
    parts = build_run(TrainingConfig.create(**options))
    trainer = Trainer(parts)
    found = []
    gradients: Any = trainer.backend.gradients  # type: ignore[attr-defined]
    with gradients.wrapped_optimizer() as optimizer:
        for piece, place in zip(gradients.pieces, places(gradients, optimizer), strict=True):
            size = getattr(piece.parameter, "ds_numel", piece.parameter.numel())
            length = min(piece.length, size - piece.start)
            values: list[Any] = [
                state[:length].float().tolist() for state in gradients.states(piece)
            ]
            entry = optimizer.state.get(gradients.masters()[piece.group], {})
            values.append(float(entry.get("step", 0)))
            if length > 0:
                found.append((place.name, piece.start, values))
    trainer.backend.close()
    parts.lock.release()
    return found


def refused(rank: int, options: dict[str, Any], of_rank_1: dict[str, Any]) -> str:
    """The message of a run that must not start; rank 1 has other options."""
    try:
        train(TrainingConfig.create(**{**options, **(of_rank_1 if rank == 1 else {})}))
    except ValueError as error:
        return str(error)
    return "was not refused"


def refused_in(rank: int, options: dict[str, Any], directories: list[str]) -> str:
    """As `refused`, each rank in a working directory of its own."""
    with contextlib.chdir(directories[rank]):
        return refused(rank, options, {})


def pushed(rank: int, options: dict[str, Any], directory: str) -> bool:
    """True if the upload of rank 0 ends though it lasts until rank 1 has ended its run."""
    ended, uploaded = Path(directory, "ended"), Path(directory, "uploaded")

    def upload(*_: Any) -> None:
        end = time.monotonic() + 60
        while not ended.exists() and time.monotonic() < end:
            time.sleep(0.05)
        if ended.exists():
            uploaded.touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "open_repository", lambda options: "me/model")
        patch.setattr(trainer, "push", upload)
        train(TrainingConfig.create(**options, push_to_hub=True))
    if rank == 1:
        ended.touch()
    return uploaded.exists() or rank == 1


def model_of(run: Path) -> bytes:
    """The final model's file."""
    return (run / "model.safetensors").read_bytes()


def deepspeed_file(directory: Path, stage: int | None = None, **values: Any) -> str:
    """A configuration of DeepSpeed."""
    if stage is not None:
        values["zero_optimization"] = {"stage": stage}
    file = directory / "deepspeed.json"
    file.write_text(json.dumps(values))
    return str(file)
