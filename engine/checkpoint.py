"""Checkpoints that are complete or absent, and what a run's directory holds."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import collectives, distributed
from .config import TrainingConfig
from .options import build, flatten, read_file, write_whole

CONFIG_FILE = "config.yaml"
STATE_FILE = "training_state.pt"
_PARTIAL = ".partial"
_REPLACED = ".replaced"


def check_output_dir(config: TrainingConfig) -> Path:
    """The run's directory, looked at and not touched.

    Raises:
        ValueError: it holds something and neither resuming nor overwriting was asked for, or it is
            to be overwritten and does not look like a run's.
    """
    assert config.run.output_dir is not None  # `TrainingConfig.resolved` has refused None
    path = Path(config.run.output_dir)
    if path.exists() and not path.is_dir():
        raise ValueError(f"output_dir={str(path)!r} is a file; name a directory.")
    if path.exists() and any(path.iterdir()) and config.run.resume_from_checkpoint is None:
        if not config.run.overwrite_output_dir:
            raise ValueError(
                f"output_dir={str(path)!r} is not empty. Use --resume_from_checkpoint latest to "
                "continue that run, --overwrite_output_dir to delete it, or another directory."
            )
        if not (path / CONFIG_FILE).exists():
            raise ValueError(
                f"overwrite_output_dir: {str(path)!r} holds files but no {CONFIG_FILE}, so it is "
                "not a run of fusedacl and is left alone. Empty it yourself."
            )
    return path


def make_output_dir(config: TrainingConfig) -> Path:
    """The run's directory, checked, emptied where that was asked for, and there."""
    path = check_output_dir(config)
    if config.run.overwrite_output_dir and path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def write_atomically(directory: Path, write: Callable[[Path], None]) -> None:
    """Fill `directory` by `write(temporary directory)`; it then exists whole, or not at all.

    Raises:
        OSError: the disk is full or not writable; what was there before is intact.
    """
    partial = directory.with_name(directory.name + _PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write(partial)
        for file in partial.iterdir():
            _flush(file)
        if directory.exists():
            replaced = directory.with_name(directory.name + _REPLACED)
            shutil.rmtree(replaced, ignore_errors=True)
            directory.replace(replaced)
            partial.replace(directory)
            shutil.rmtree(replaced)
        else:
            partial.replace(directory)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        # safetensors reports a full disk by an exception of its own.
        if isinstance(error, OSError) or "No space left" in str(error):
            kept = ", ".join(path.name for path in checkpoints(directory.parent))
            remedy = (
                f"complete checkpoints there: {kept}. Free some space, then "
                "--resume_from_checkpoint latest."
                if kept
                else "there is no checkpoint to resume from. Free some space and run again."
            )
            raise OSError(
                f"{directory.name} could not be saved in {str(directory.parent)!r}: {error}. "
                f"Nothing saved earlier was touched; {remedy}"
            ) from error
        raise


def _flush(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def save_model(
    directory: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """config.json, model.safetensors and the tokenizer's files; `weights`: in place of its own."""
    model.save_pretrained(directory, state_dict=weights)
    tokenizer.save_pretrained(directory)


def save_checkpoint(
    output_dir: Path,
    step: int,
    model: PreTrainedModel,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, Any],
    keep: int | None,
) -> Path:
    """Write `checkpoint-<step>` with the model and each process's `state`; keep the newest `keep`.

    `weights`: the model's, whole. Every process of the run calls this.

    Raises:
        OSError: see `write_atomically`.
    """
    directory = output_dir / f"checkpoint-{step}"
    rank = distributed.rank()

    def write_own(partial: Path) -> None:
        if rank == 0:
            save_model(partial, model, tokenizer, weights)
        # By a file of ours: given a path, torch reports a full disk as an internal error.
        with (partial / state_file(rank)).open("wb") as file:
            torch.save(state, file)

    def write_all(partial: Path) -> None:
        distributed.barrier()  # the directory is there
        collectives.together(lambda: write_own(partial))

    def write() -> None:
        if rank == 0:
            write_atomically(directory, write_all)
        else:
            write_all(directory.with_name(directory.name + _PARTIAL))

    collectives.together(write)
    if rank == 0 and keep is not None:
        for old in checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old)
    return directory


def state_file(rank: int) -> str:
    """The name of the file with a process's state."""
    return STATE_FILE if rank == 0 else f"training_state-process{rank}.pt"


def checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [
        path
        for path in output_dir.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit() and (path / STATE_FILE).is_file()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def find_checkpoint(output_dir: Path, name: str) -> Path:
    """The checkpoint that `resume_from_checkpoint` names: 'latest', a name in the run, or a path.

    Raises:
        ValueError: there is none.
    """
    available = checkpoints(output_dir)
    if name == "latest" and available:
        return available[-1]
    for candidate in (output_dir / name, Path(name)):
        if candidate.resolve() in [path.resolve() for path in available]:
            return candidate
    names = ", ".join(path.name for path in available) or "none"
    raise ValueError(
        f"resume_from_checkpoint={name!r}: no such complete checkpoint in {str(output_dir)!r}. "
        f"There: {names}."
    )


def load_state(checkpoint: Path, rank: int = 0, world_size: int = 1) -> dict[str, Any]:
    """A process's training state in a checkpoint; tensors and plain values only, never code.

    Raises:
        ValueError: the file is damaged, or a run of another number of processes wrote it.
    """
    state = _load(checkpoint / STATE_FILE)
    before = state.get("world_size", 1)
    if before != world_size:
        raise ValueError(
            f"{str(checkpoint)!r} was saved by a run of {before} process(es); this one has "
            f"{world_size}. Each holds its part of the optimizer: resume with {before}, or start a "
            f"new run from the weights alone (model_name_or_path={str(checkpoint)!r})."
        )
    return state if rank == 0 else _load(checkpoint / state_file(rank))


def _load(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{str(path)!r} is damaged and cannot be resumed from: {error}") from None


def check_same_run(output_dir: Path, config: TrainingConfig) -> None:
    """Refuse to resume with options other than the run's.

    Raises:
        ValueError: naming the options that differ. Those of the section `run` may.
    """
    changed = changed_options(output_dir, config)
    if changed:
        raise ValueError(
            f"resume_from_checkpoint: the options differ from those in "
            f"{str(output_dir / CONFIG_FILE)!r} ({'; '.join(changed)}). "
            "Resume with the same options, or start a new run."
        )


def changed_options(
    output_dir: Path, config: TrainingConfig, free: Collection[str] = ()
) -> list[str]:
    """How a run's options differ from `config`: "name: this then, that now", one each.

    Those of the section `run` and those named in `free` may differ.
    """
    saved = flatten(build(TrainingConfig, read_file(output_dir / CONFIG_FILE)).resolved())
    now = flatten(config.resolved())
    return [
        f"{name}: {saved[name]!r} then, {now[name]!r} now"
        for name in now
        if name not in vars(config.run) and name not in free and now[name] != saved[name]
    ]


def write_json(path: Path, values: Any) -> None:
    """A JSON file, whole or absent."""
    write_whole(path, json.dumps(values, indent=2) + "\n")
