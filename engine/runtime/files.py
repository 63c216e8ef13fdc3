"""Files written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml


def write_json(path: Path, values: Any) -> None:
    """A JSON file, whole or absent."""
    write_whole(path, json.dumps(values, indent=2) + "\n")


def flush(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_file(path: str | Path) -> dict[str, Any]:
    """Option names and values of a YAML or JSON file.

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
    """Write a text file that is never seen half-written, nor lost when the disk is full."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
