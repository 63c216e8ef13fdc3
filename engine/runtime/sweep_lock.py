"""One sweep at a time in a directory, by a lock that the runs it starts hold with it.

A sweep that is killed leaves runs behind. They keep the lock until they end, so that the next sweep
does not start the same runs beside them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO


class SweepLock:
    """The lock of a sweep's directory, a file there that also names the processes at work."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._path = directory / ".lock"
        self._file: IO[str] | None = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within the block no other sweep runs there.

        Raises:
            ValueError: another sweep does, or runs that a killed one left behind; they are named.
        """
        with self._path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                alive = [number for number in file.read().split() if _is_alive(int(number))]
                raise ValueError(
                    f"output_dir={str(self.directory)!r}: another sweep is running there, or runs "
                    f"that a killed one left behind (process {', '.join(alive) or 'unknown'}). "
                    "Wait until they end, stop them (on `kill` they save a checkpoint), or name "
                    "another directory."
                ) from None
            self._file = file
            try:
                yield
            finally:
                self._file = None

    def is_held(self) -> bool:
        """Whether a sweep, or a run that one left behind, is at work there."""
        try:
            with self._path.open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    @property
    def descriptors(self) -> list[int]:
        """What a run has to inherit to hold the lock, too."""
        return [] if self._file is None else [self._file.fileno()]

    def name(self, processes: Sequence[int]) -> None:
        """Note who is at work, for those who find the directory locked."""
        if self._file is not None:
            self._file.seek(0)
            self._file.truncate()
            self._file.write(" ".join(map(str, processes)))
            self._file.flush()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
