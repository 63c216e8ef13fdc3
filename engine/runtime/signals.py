"""Signals that stop a run at the end of a step."""

from __future__ import annotations

import logging
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

logger = logging.getLogger("fusedacl")
# After a Ctrl-C, launchers send signals of their own to processes that have had one already.
ECHO_SECONDS = 3.0


class Interrupted(Exception):
    """The run was stopped by a signal after saving a checkpoint; `exit_code` tells which signal."""

    def __init__(self, number: int, checkpoint: Path) -> None:
        super().__init__(
            f"Stopped by {signal.Signals(number).name}. Saved {checkpoint}. Continue by running "
            "the same command with --resume_from_checkpoint latest."
        )
        self.exit_code = 128 + number


def stopping_signals() -> list[int]:
    """SIGINT, SIGTERM, and SIGHUP (a terminal that closes) unless it is ignored, as under nohup."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)  # unknown on Windows
    if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
        numbers.append(hangup)
    return [int(number) for number in numbers]


class SignalsNoted:
    """Note the stopping signals within a `with` block.

    words: logged at the first signal. A SIGINT later than `ECHO_SECONDS` after it raises
        KeyboardInterrupt, unless `patient`; the log says so after a SIGINT.
    received: number of the first signal, None until one came.
    """

    def __init__(self, words: str = "saving after this step …", patient: bool = False) -> None:
        self.words = words
        self.patient = patient
        self.received: int | None = None
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> SignalsNoted:
        for number in stopping_signals():
            try:
                self._previous[number] = signal.signal(number, self._note)
            except ValueError:  # only the main thread may set handlers
                break
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = number, time.monotonic()
            again = ""
            if number == signal.SIGINT and not self.patient:
                again = f" (Ctrl-C again after {ECHO_SECONDS:g} s ends without saving)"
            logger.warning("%s: %s%s", signal.Signals(number).name, self.words, again)
        elif number == signal.SIGINT and not self.patient and self._is_late():
            raise KeyboardInterrupt

    def _is_late(self) -> bool:
        return time.monotonic() - self._since > ECHO_SECONDS

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
