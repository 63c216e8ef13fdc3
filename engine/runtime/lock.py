"""Locks on the directory of a run, of a sweep and of a feature cache.

A lock is `flock` on a file in the directory. The system releases it when the last process that
holds the file open has ended, however it ended, so the file itself may stay.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

LOCK_FILE = ".lock"
# `is_held` takes a lock for a moment.
_PATIENCE_SECONDS = 0.5

logger = logging.getLogger("fusedacl")


class DirectoryLock:
    """The lock of a directory: a file there, which names the processes that hold it."""

    refusal = "{directory!r} is in use ({holders})."

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._path = directory / LOCK_FILE
        self._file: IO[str] | None = None

    def take(self, waiting: str | None = None) -> None:
        """Hold the lock until `release`; the directory is created if it does not exist.

        waiting: log this line and wait for a lock that is held; None: refuse it.

        Raises:
            ValueError: other processes hold the lock; the message names them.
        """
        if self._file is not None:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        end = time.monotonic() + _PATIENCE_SECONDS
        with contextlib.ExitStack() as opened:
            # "a+" and not "w": until the lock is taken, the file names its holders.
            file = opened.enter_context(self._path.open("a+", encoding="utf-8"))
            while not self._lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
                if waiting is not None:
                    logger.info(waiting)
                    self._lock(file, fcntl.LOCK_EX)
                    break
                if time.monotonic() > end:
                    raise self._refused(file)
                time.sleep(0.05)
            opened.pop_all()
        self._file = file
        self.name([os.getpid()])

    def release(self) -> None:
        """Give up the lock, if it is held; the file stays, because others may wait for it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @contextlib.contextmanager
    def held(self, waiting: str | None = None) -> Iterator[None]:
        """Hold the lock within the block; arguments and errors as for `take`."""
        self.take(waiting)
        try:
            yield
        finally:
            self.release()

    def check_free(self) -> None:
        """Refuse a directory whose lock is held; nothing is created or changed.

        Raises:
            ValueError: as `take`.
        """
        # Without a file there is no lock.
        with contextlib.suppress(OSError), self._path.open(encoding="utf-8") as file:
            if not self._lock(file, fcntl.LOCK_SH | fcntl.LOCK_NB):
                raise self._refused(file)

    def is_held(self) -> bool:
        """Return whether any process holds the lock."""
        try:
            self.check_free()
        except ValueError:
            return True
        return False

    @property
    def descriptors(self) -> list[int]:
        """File descriptors through which a child process that inherits them holds the lock too."""
        return [] if self._file is None else [self._file.fileno()]

    def name(self, processes: Sequence[int]) -> None:
        """Write down which processes hold the lock, for the message of a refusal."""
        if self._file is not None:
            self._file.truncate(0)
            self._file.write(" ".join([socket.gethostname(), *map(str, processes)]))
            self._file.flush()

    def _lock(self, file: IO[str], operation: int) -> bool:
        """Call flock; return False where another process holds the lock."""
        try:
            fcntl.flock(file, operation)
        except BlockingIOError:
            return False
        except OSError as error:
            # Some network file systems have no locks: to run without one is better than not to run.
            words = "%s cannot be locked (%s): make sure that no other process uses it."
            logger.warning(words, self.directory, error)
        return True

    def _refused(self, file: IO[str]) -> ValueError:
        file.seek(0)
        host, *processes = file.read().split() or [""]
        if host == socket.gethostname():
            processes = [process for process in processes if is_running(int(process))]
        holders = f"process {', '.join(processes)} on {host}" if processes else "unknown process"
        return ValueError(self.refusal.format(directory=str(self.directory), holders=holders))


class RunLock(DirectoryLock):
    """The lock of a run's output directory."""

    refusal = (
        "output_dir={directory!r}: another run is at work there ({holders}). Wait until it ends, "
        "stop it (on `kill` it saves a checkpoint), or name another directory."
    )


class SweepLock(DirectoryLock):
    """The lock of a sweep's directory, which the runs that it starts hold too.

    Runs that a killed sweep left behind keep the lock, so that the next sweep does not start the
    same runs again.
    """

    refusal = (
        "output_dir={directory!r}: another sweep is running there, or runs that a killed one left "
        "behind ({holders}). Wait until they end, stop them (on `kill` they save a checkpoint), or "
        "name another directory."
    )


def is_running(process: int) -> bool:
    """Return whether a process of this machine runs; a zombie has ended."""
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except OSError:  # another user's process, or a system without /proc
        return True
    return state not in ("Z", "X")
