"""Signals that stop a run at the end of a step."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

logger = logging.getLogger(__name__)


class Noting(Protocol):
    """An object that remembers the number of the signal that came, or None."""

    signal: int | None


class Interrupted(Exception):
    """The run was stopped by a signal after saving a checkpoint; `exit_code` tells which signal."""

    def __init__(self, number: int, checkpoint: Path) -> None:
        super().__init__(
            f"Stopped by {signal.Signals(number).name}. Saved {checkpoint}. Continue by running "
            "the same command with --resume_from_checkpoint latest."
        )
        self.exit_code = 128 + number


class SignalsNoted:
    """Within the block SIGINT and SIGTERM are noted for the end of the step; a second one acts."""

    def __init__(self, trainer: Noting) -> None:
        self.trainer = trainer
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.previous[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread: the caller's signals are the caller's
                return

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.trainer.signal is not None:
            raise KeyboardInterrupt
        self.trainer.signal = number
        logger.warning("%s: saving after this step …", signal.Signals(number).name)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
