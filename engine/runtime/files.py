"""Files that are written completely or not at all, and configuration files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file with `write_whole`."""
    write_whole(path, json.dumps(values, indent=2) + "\n")


def flush(path: Path) -> None:
    """Wait until a file, or the entries of a directory, are on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_file(path: str | Path) -> dict[str, Any]:
    """Read option names and values from a YAML or JSON file.

    Raises:
        ValueError: the file is missing, unreadable, or not a mapping of names to values.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"Configuration file {str(path)!r} does not exist.")
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"Configuration file {str(path)!r} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"Configuration file {str(path)!r} must hold `option: value` lines.")
    return {str(name): value for name, value in values.items()}


def write_whole(path: Path, text: str) -> None:
    """Write a text file in one step: readers see the old content or the new, never a part."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
