"""Files that are written completely or not at all, and configuration files."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

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


def flush_entries(directory: Path) -> None:
    """Flush the entries of a directory, where the file system can: some network ones cannot."""
    try:
        flush(directory)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise


def disk_remedy(error: BaseException) -> str:
    """Return what to do about a file that could not be written."""
    full = (os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT))
    is_full = any(words in str(error) for words in full)
    return "Free some space" if is_full else "Remove the cause of that error"


def kind_of_file(path: Path) -> str | None:
    """Name what is at `path` if it can be no ordinary file or directory; None if it can."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            return "a symbolic link that leads in a circle"
        if path.is_symlink():
            return f"a symbolic link to {os.readlink(path)!r}, which does not exist"
        return None
    if stat.S_ISFIFO(mode):
        return "a named pipe (FIFO), which can be read only once"
    if stat.S_ISSOCK(mode):
        return "a socket"
    return "a device" if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else None


def check_writable(path: Path, option: str, *, directory: bool = False) -> None:
    """Refuse a file that could not be written, or a directory that could not be made or filled.

    directory: whether `path`, where it exists, has to be a directory.

    Raises:
        ValueError: names the option, the path and what is in the way.
    """
    # A link keeps its place: commands write what it names. Unlike the methods of Path, these
    # functions raise no error where a directory may not be searched.
    place = Path(os.path.realpath(path))
    if not os.path.isdir(place):
        if directory and os.path.exists(place):
            raise ValueError(f"{option}={str(path)!r} is a file: name a directory.")
        place = place.parent
    while not os.path.exists(place):
        place = place.parent
    if not os.path.isdir(place):
        raise ValueError(
            f"{option}={str(path)!r} cannot be written: {str(place)!r} is a file, no directory. "
            "Name another place."
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(
            f"{option}={str(path)!r} cannot be written: the directory {str(place)!r} does not "
            "permit it. Change its permissions, or name another place."
        )


def unique_keys(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """Make a mapping of names and values.

    Raises:
        ValueError: a name is given twice.
    """
    values: dict[Any, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{name!r} is given twice")
        values[name] = value
    return values


class _Loader(yaml.SafeLoader):
    """YAML loader that refuses a key that is given twice, also through `<<`."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        given = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        try:
            unique_keys((self.construct_object(key, deep=True), None) for key in given)
        except ValueError as error:
            mark = node.start_mark
            raise yaml.constructor.ConstructorError(None, None, str(error), mark) from None
        return super().construct_mapping(node, deep=deep)


def read_file(path: str | Path) -> dict[str, Any]:
    """Read option names and values from a YAML or JSON file.

    Raises:
        ValueError: as `read_values`, or the file is not a mapping of names to values.
    """
    values = read_values(path)
    if not isinstance(values, dict):
        raise ValueError(f"Configuration file {str(path)!r} must hold `option: value` lines.")
    return {str(name): value for name, value in values.items()}


def read_values(path: str | Path) -> Any:
    """Read a YAML or JSON file.

    Raises:
        ValueError: the file is missing or unreadable, or gives a name twice.
    """
    path = Path(path)
    if not path.is_file():
        kind = "a directory" if path.is_dir() else kind_of_file(path)
        problem = "does not exist" if kind is None else f"is {kind}: name a YAML or JSON file"
        raise ValueError(f"Configuration file {str(path)!r} {problem}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            return json.loads(text, object_pairs_hook=unique_keys)
        return yaml.load(text, _Loader)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"Configuration file {str(path)!r} cannot be read: {error}") from None


def write_whole(path: Path, text: str) -> None:
    """Write a text file in one step: readers see the old content or the new, never a part."""
    with replacing(path) as file:
        file.write(text)


@contextlib.contextmanager
def replacing(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """A text file that takes the place of `path` where the block ends without an error."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8", newline=newline) as file:
        yield file
    partial.replace(path)
