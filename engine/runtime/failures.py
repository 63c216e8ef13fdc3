"""The other processes of a run: which of them has ended, when an exchange with them fails."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import torch.distributed as dist

from . import collectives, processes

# Of errors that torch raises as plain RuntimeErrors.
_SIGNS = ("gloo", "connection", "timed out", "timeout", "nccl")


class Peers:
    """Where each process of the run lives. Collective."""

    def __init__(self) -> None:
        self.places = collectives.gathered((*_machine(), os.getpid()))
        # Of the launcher: it changes when that one dies.
        self.parent = os.getppid()

    def launcher_is_gone(self) -> bool:
        """Whether the launcher that started this process has ended."""
        return processes.launched() is not None and os.getppid() != self.parent

    def ended(self) -> list[int]:
        """The processes of this machine that are no more; of other machines nothing is known."""
        here = _machine()
        return [
            rank
            for rank, (*machine, process) in enumerate(self.places)
            if tuple(machine) == here and not _is_running(process)
        ]

    def explain(self, error: RuntimeError, step: int) -> OSError | None:
        """What a failed exchange with them means, in words; None: `error` is something else."""
        is_of_exchange = isinstance(error, dist.DistError) or any(
            sign in str(error).lower() for sign in _SIGNS
        )
        if processes.world_size() == 1 or not is_of_exchange:
            return None
        ended = self.ended()
        who = f"process {processes.rank()} of {processes.world_size()} on {_machine()[0]}"
        what = (
            f"process(es) {', '.join(map(str, ended))} on this machine ended"
            if ended
            else "another process, on another machine, ended or cannot be reached"
        )
        reason = str(error).strip().splitlines()[0]
        return OSError(
            f"{who} stops after step {step}: {what} ({reason}). See that process's own output for "
            "why. Start all of them again with --resume_from_checkpoint latest."
        )


def _machine() -> tuple[str, str]:
    """This machine, as far as process numbers mean the same: its name and number space."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return socket.gethostname(), space


def _is_running(process: int) -> bool:
    """Whether it is there and not merely waiting for its parent to see that it has ended."""
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except OSError:  # another user's, or a system without /proc
        return True
    return state not in ("Z", "X")
