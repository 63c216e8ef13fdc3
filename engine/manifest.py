"""What a checkpoint consists of, written when all of it is there: sizes and checksums."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from .options import write_whole

MANIFEST_FILE = "manifest.json"


def flush(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sealed(file: Path) -> dict[str, str | int]:
    """Size (bytes) and SHA-256 of a file, which is on the disk then."""
    flush(file)
    return {"bytes": file.stat().st_size, "sha256": _checksum(file)}


def write_manifest(directory: Path, files: Mapping[str, Mapping[str, str | int]]) -> None:
    """Note the directory's files, as `sealed` gave them; nothing may be written there after it."""
    write_whole(directory / MANIFEST_FILE, json.dumps({"files": files}, indent=2) + "\n")
    flush(directory / MANIFEST_FILE)


def fault(directory: Path, *, thorough: bool = True) -> str | None:
    """What is wrong with a checkpoint, in words; None: it is what was saved.

    `thorough`: read every byte; else look at the sizes only.
    """
    try:
        text = (directory / MANIFEST_FILE).read_text(encoding="utf-8")
        noted = {
            str(name): (int(seal["bytes"]), str(seal["sha256"]))
            for name, seal in json.loads(text)["files"].items()
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
