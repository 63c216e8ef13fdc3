"""The manifest of a checkpoint or a model: sizes and checksums of its files, written last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from .files import flush, flush_entries, write_json

CHECKPOINT_PREFIX = "checkpoint-"
MANIFEST_FILE = "manifest.json"


def sealed(file: Path) -> dict[str, str | int]:
    """Flush a file to the disk and return its size (bytes) and SHA-256."""
    flush(file)
    return {"bytes": file.stat().st_size, "sha256": _checksum(file)}


def write_manifest(directory: Path, files: Mapping[str, Mapping[str, str | int]]) -> None:
    """Write the manifest of files as `sealed` returned them; no file may change afterwards."""
    write_json(directory / MANIFEST_FILE, {"files": files})
    flush(directory / MANIFEST_FILE)


def is_model_file(name: str) -> bool:
    """True for weights and vocabulary; config.json and the model card may be changed later."""
    return name.endswith(".safetensors") or name in ("tokenizer.json", "vocab.txt")


def seal_model(directory: Path) -> None:
    """Write the manifest of a final model, which `model_fault` compares."""
    files = sorted(file for file in directory.iterdir() if is_model_file(file.name))
    write_manifest(directory, {file.name: sealed(file) for file in files})


def publish_model(staged: Path, directory: Path) -> list[str]:
    """Move the files of a model into `directory`, the manifest last; returns their names.

    A process that is killed meanwhile leaves whole files, and a manifest that tells if they differ.
    """
    files = sorted(staged.iterdir(), key=lambda file: file.name == MANIFEST_FILE)
    for file in files:
        file.replace(directory / file.name)
    flush_entries(directory)
    return [file.name for file in files]


def model_fault(directory: Path) -> str | None:
    """Return a sentence on how weights or vocabulary differ from the manifest.

    None if they do not, or if there is no manifest, as in a model of an earlier version.
    """
    if not (directory / MANIFEST_FILE).is_file():
        return None
    return fault(directory, compared=is_model_file)


def fault(
    directory: Path, *, thorough: bool = True, compared: Callable[[str], bool] = lambda name: True
) -> str | None:
    """Return a sentence on how a checkpoint differs from its manifest, None if it does not.

    thorough: compare checksums too, not only sizes. compared: chooses files by their names.
    """
    try:
        text = (directory / MANIFEST_FILE).read_text(encoding="utf-8")
        noted = {
            str(name): (int(seal["bytes"]), str(seal["sha256"]))
            for name, seal in json.loads(text)["files"].items()
            if compared(name)
        }
    except FileNotFoundError:
        return f"{directory.name} is incomplete: it has no {MANIFEST_FILE}, which is written last"
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{directory.name} is damaged: {MANIFEST_FILE} cannot be read ({error!r})"
    for name, (size, checksum) in noted.items():
        try:
            found = (directory / name).stat().st_size
            changed = found == size and thorough and _checksum(directory / name) != checksum
        except FileNotFoundError:
            return f"{directory.name} is damaged: {name} is missing"
        except OSError as error:
            return f"{directory.name} is damaged: {name} cannot be read ({error})"
        if found != size:
            return f"{directory.name} is damaged: {name} has {found} bytes, {size} were saved"
        if changed:
            return f"{directory.name} is damaged: {name} is not what was saved (other SHA-256)"
    return None


def _checksum(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step in a checkpoint directory's name."""
    return int(checkpoint.name.removeprefix(CHECKPOINT_PREFIX).split(".")[0])


def checkpoint_directories(output_dir: Path) -> list[Path]:
    """Return every directory named like a checkpoint, complete or not, by step."""
    found = output_dir.glob(f"{CHECKPOINT_PREFIX}*")
    named = (path for path in found if path.name.removeprefix(CHECKPOINT_PREFIX).isdigit())
    return sorted(filter(Path.is_dir, named), key=step_of)


def check_not_sealed(directory: Path) -> None:
    """Refuse a directory whose files may not change, because its manifest lists them.

    Raises:
        ValueError: the directory is a checkpoint of a run.
    """
    directory = directory.resolve()
    is_named_so = directory in checkpoint_directories(directory.parent)
    if is_named_so and (directory / MANIFEST_FILE).is_file():
        raise ValueError(
            f"model_name_or_path={str(directory)!r} is a checkpoint: with another policy stored in "
            "it, it would count as damaged, and no run could be resumed from it. Name the run's "
            f"directory, {str(directory.parent)!r}, or a copy of the checkpoint under another name."
        )
