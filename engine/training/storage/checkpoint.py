"""Checkpoints that are complete or absent, and what a run's directory holds."""

import contextlib
import logging
import math
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...config.fields import build, flatten
from ...config.training import TrainingConfig
from ...runtime import collectives, processes
from ...runtime.files import disk_remedy, flush, flush_entries, read_file
from ...runtime.manifest import (
    CHECKPOINT_PREFIX,
    checkpoint_directories,
    fault,
    publish_model,
    seal_model,
    sealed,
    step_of,
    write_manifest,
)

CONFIG_FILE = "config.yaml"
RESULTS_FILE = "results.json"
_STATES = "training_state"
STATE_FILE = f"{_STATES}.pt"
PARTIAL = ".partial"
_REPLACED = ".replaced"
# Suffix of checkpoints later than the one from which the run was resumed.
_ASIDE = ".superseded"
# In the messages of safetensors, whose exceptions are no OSErrors.
_SYSTEMS = "(os error "

logger = logging.getLogger("fusedacl")


def _begin(partial: Path) -> None:
    """Make an empty directory; what a killed save left there must be gone."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(partial)
    partial.mkdir(parents=True)


def _discard(directory: Path, name: Path | None = None) -> None:
    """Delete a directory, renamed first if a `name` is given; an error of the disk is logged.

    A run goes on beside what it cannot delete, such as an open file on a network file system.
    """
    try:
        if name is not None:
            shutil.rmtree(name, ignore_errors=True)
            directory = directory.replace(name)
        shutil.rmtree(directory)
    except OSError as error:
        logger.warning("%s could not be deleted and takes up room: %s", directory, error)


def _publish(partial: Path, directory: Path) -> None:
    """Give a directory its final name, replacing an earlier one of that name."""
    flush_entries(partial)
    replaced = directory.with_name(directory.name + _REPLACED)
    if directory.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        directory.replace(replaced)
    partial.replace(directory)
    flush_entries(directory.parent)
    shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def _told(directory: Path) -> Iterator[None]:
    """Explain an error of the disk: which checkpoints there are, and how to continue."""
    try:
        yield
    except Exception as error:
        reason = _disk_error(error)
        if reason is None:
            raise
        kept = ", ".join(path.name for path in checkpoints(directory.parent))
        remedy = (
            f"complete checkpoints there: {kept}. {disk_remedy(reason)}, then "
            "--resume_from_checkpoint latest."
            if kept
            else f"there is no checkpoint to resume from. {disk_remedy(reason)} and run again."
        )
        raise OSError(
            f"{directory.name} could not be saved in {str(directory.parent)!r}: {reason}. "
            f"Nothing saved earlier was touched; {remedy}"
        ) from error


def _disk_error(error: BaseException) -> BaseException | None:
    """The error of the disk behind an exception, None if there is none.

    safetensors has its own exception for what the system reports, and torch's writer ends with an
    internal error on top of the first.
    """
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) or _SYSTEMS in str(found):
            return found
        found = found.__cause__ or found.__context__
    return None


def save_model(
    directory: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write config.json, model.safetensors and the tokenizer; weights: replace the model's."""
    model.save_pretrained(directory, state_dict=weights)
    tokenizer.save_pretrained(directory)


def save_final(
    output_dir: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
) -> list[str]:
    """Save the final model and its card at the top of the output directory.

    Returns: names of the model's files.

    Raises:
        OSError: the disk is full or not writable; checkpoints are intact.
    """
    directory = output_dir / "model"
    try:
        with _told(directory):
            _begin(directory)
            save_model(directory, model, tokenizer)
            (directory / "README.md").write_text(card, encoding="utf-8")
            seal_model(directory)
            for file in directory.iterdir():
                flush(file)
    except Exception:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    names = publish_model(directory, output_dir)
    directory.rmdir()
    return names


def save_checkpoint(
    output_dir: Path,
    step: int,
    model: PreTrainedModel,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, Any],
    keep: int | None,
    best: int | None = None,
) -> Path:
    """Write `checkpoint-<step>` and delete older ones. Every process of the run calls this.

    Args:
        weights: all weights of the model.
        state: of this process.
        keep: number of checkpoints to keep, the newest ones and always that of the step `best`;
            None: all.

    Raises:
        OSError: the disk is full or not writable; earlier checkpoints are intact.
    """
    directory = checkpoint_of(output_dir, step)
    partial = directory.with_name(directory.name + PARTIAL)
    rank = processes.rank()

    def write_own() -> dict[str, dict[str, str | int]]:
        if rank == 0:
            save_model(partial, model, tokenizer, weights)
        # An open file, because for a path torch reports a full disk as an internal error.
        with (partial / state_file(rank)).open("wb") as file:
            torch.save(state, file)
        files = [partial / state_file(rank)]
        if rank == 0:
            files += [file for file in partial.iterdir() if not file.name.startswith(_STATES)]
        return {file.name: sealed(file) for file in sorted(files)}

    def publish() -> None:
        write_manifest(partial, {name: seal for part in parts for name, seal in part.items()})
        _publish(partial, directory)

    def together(action: Callable[[], Any], by_all: bool = False) -> Any:
        """Each action ends on all processes before the next begins on any."""

        def told() -> Any:
            with _told(directory):
                return action() if by_all or rank == 0 else None

        return collectives.together(told)

    try:
        together(lambda: _begin(partial))
        parts = collectives.gathered(together(write_own, by_all=True))
        together(publish)
    except Exception:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if rank == 0 and keep is not None:
        _forget(output_dir, step, keep, best)
    return directory


def _forget(output_dir: Path, step: int, keep: int, best: int | None) -> None:
    """Delete the surplus of checkpoints before `step`, and those that were set aside."""
    older = [path for path in checkpoints(output_dir) if step_of(path) < step]
    others = [path for path in older if step_of(path) != best]
    num_kept = max(0, keep - 1 - (len(older) - len(others)))
    aside = output_dir.glob(f"{CHECKPOINT_PREFIX}*{_ASIDE}")
    too_many = others[: len(others) - num_kept]
    for path in (*too_many, *(path for path in aside if step_of(path) <= step)):
        # Renamed first, so that a kill in between leaves nothing that looks like a checkpoint.
        _discard(path, output_dir / f"{CHECKPOINT_PREFIX}{step_of(path)}{PARTIAL}")


def state_file(rank: int) -> str:
    """The name of the file with the state of a process."""
    return STATE_FILE if rank == 0 else f"{_STATES}-process{rank}.pt"


def checkpoint_of(output_dir: Path, step: int) -> Path:
    """The path of the checkpoint of an optimizer step."""
    return output_dir / f"{CHECKPOINT_PREFIX}{step}"


def checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first, by the names and sizes of their files."""
    found = checkpoint_directories(output_dir)
    return [path for path in found if fault(path, thorough=False) is None]


def find_checkpoint(output_dir: Path, name: str) -> Path:
    """The checkpoint that `resume_from_checkpoint` names: 'latest', a name in the run, or a path.

    Every byte of it is checked. 'latest' is the newest that is intact; newer ones that are damaged
    are named in the log.

    Raises:
        ValueError: there is none, or the named one is damaged.
    """
    found = checkpoint_directories(output_dir)
    if name == "latest":
        for path in reversed(found):
            problem = fault(path)
            if problem is None:
                return path
            logger.warning("Not resuming from %s: %s.", path.name, problem)
    for candidate in (output_dir / name, Path(name)):
        if candidate.resolve() in [path.resolve() for path in found]:
            problem = fault(candidate)
            if problem is None:
                return candidate
            raise ValueError(f"resume_from_checkpoint={name!r}: {problem}. {_complete(output_dir)}")
    raise ValueError(
        f"resume_from_checkpoint={name!r}: no such complete checkpoint in {str(output_dir)!r}. "
        f"{_complete(output_dir)}"
    )


def _complete(output_dir: Path) -> str:
    found = checkpoint_directories(output_dir)
    names = ", ".join(path.name for path in found if fault(path) is None)
    if names:
        return f"Complete checkpoints there: {names}; 'latest' takes the newest of them."
    why = f"all {len(found)} there are damaged or incomplete" if found else "there are none"
    return f"No checkpoint can be used: {why}. --overwrite_output_dir starts a new run."


def tidy(output_dir: Path) -> None:
    """Delete checkpoints that a killed run left half-written or half-deleted."""
    for path in output_dir.glob(f"{CHECKPOINT_PREFIX}*{PARTIAL}"):
        _discard(path)


def set_aside(output_dir: Path, step: int) -> None:
    """Rename the checkpoints after `step`, at which the run resumes and from where it saves anew.

    Left in place they would be the newest ones, and would not match metrics.jsonl.
    """
    for path in reversed(checkpoint_directories(output_dir)):
        if step_of(path) > step:
            aside = path.with_name(path.name + _ASIDE)
            shutil.rmtree(aside, ignore_errors=True)
            path.replace(aside)
            logger.info("%s is later than step %d: it is now %s.", path.name, step, aside.name)


def load_state(checkpoint: Path, rank: int = 0) -> dict[str, Any]:
    """The training state of a process in a checkpoint: tensors and plain values, never code.

    The tensors stay in the file until they are read.

    Raises:
        ValueError: the file is missing or damaged.
    """
    return _load(checkpoint / state_file(rank))


def _load(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"{str(path)!r} is damaged and cannot be resumed from: {error}") from None


def learned_temperature(run: Path) -> float | None:
    """The temperature that a run, or a checkpoint of it, has learned; None if it was constant."""
    if (run / STATE_FILE).exists():
        learned = _load(run / STATE_FILE).get("losses", {}).get("temperature")
        return None if learned is None else math.exp(-learned["log_scale"])
    results = run / RESULTS_FILE
    return read_file(results).get("temperature") if results.exists() else None


def changed_options(
    output_dir: Path, config: TrainingConfig, free: Collection[str] = (), choice_too: bool = False
) -> list[str]:
    """Differences between the options of a run and `config`, each as "name: this then, that now".

    Options of the section `run` and those named in `free` are ignored. choice_too: compare also
    those of `run` that choose the step whose weights become the final model.
    """
    saved = build(TrainingConfig, read_file(output_dir / CONFIG_FILE)).resolved()
    found = differences(lasting_options(saved), lasting_options(config), free)
    if choice_too and saved.run.choice != config.run.choice:
        names = saved.run.choice.keys() | config.run.choice.keys()
        found += differences(*({n: getattr(of.run, n) for n in names} for of in (saved, config)))
    return found


def differences(
    saved: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str] = ()
) -> list[str]:
    """Each option, except those in `free`, whose value has changed."""
    return [
        f"{name}: {saved[name]!r} then, {now[name]!r} now"
        for name in now
        if name in saved and name not in free and now[name] != saved[name]
    ]


def lasting_options(config: TrainingConfig) -> dict[str, Any]:
    """The options that must not change on resuming: all except those of the section `run`."""
    resolved = config.resolved()
    return {name: v for name, v in flatten(resolved).items() if name not in vars(resolved.run)}
