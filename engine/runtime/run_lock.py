"""One run at a time in an output directory: a lock that ends with the process that holds it."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from pathlib import Path
from typing import IO

LOCK_FILE = ".lock"
# Another process may hold it for a moment, to see whether it is held.
_PATIENCE_SECONDS = 1.0

logger = logging.getLogger("fusedacl")


class RunLock:
    """The lock of a run's directory, a file there that names the process at work.

    The system gives it back when that process ends, however it ends: the file may stay.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file: IO[str] | None = None

    def take(self) -> None:
        """Hold the lock until `release`; the directory is made if it is not there.

        Raises:
            ValueError: another run is at work there; its process and machine are named.
        """
        if self._file is not None:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        # Not "w": the words in it are the holder's until it is ours.
        file = (self.directory / LOCK_FILE).open("a+", encoding="utf-8")
        try:
            self._wait(file)
        except BaseException:
            file.close()
            raise
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        self._file = file

    def check_free(self) -> None:
        """Refuse a directory in which a run is at work; nothing is touched.

        Raises:
            ValueError: as `take`.
        """
        try:
            file = (self.directory / LOCK_FILE).open(encoding="utf-8")
        except OSError:  # no lock, hence no run
            return
        with file:
            self._try(file, fcntl.LOCK_SH)

    def release(self) -> None:
        """Give it back, if it is held; the file stays, so that all runs lock the same one."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _wait(self, file: IO[str]) -> None:
        end = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                return self._try(file, fcntl.LOCK_EX)
            except ValueError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)

    def _try(self, file: IO[str], kind: int) -> None:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"output_dir={str(self.directory)!r}: another run is at work there "
                f"({file.read() or 'unknown process'}). Wait until it ends, stop it (on `kill` it "
                "saves a checkpoint), or name another directory."
            ) from None
        except OSError as error:
            # Some network file systems have no locks: a run there is better than none.
            logger.warning(
                "output_dir=%s cannot be locked (%s): see that no other run uses it.",
                self.directory,
                error,
            )
