"""Explanations of failed exchanges between processes: which process has ended."""

from __future__ import annotations

import os
import socket

import torch.distributed as dist

from . import collectives, processes
from .lock import is_running

# Words by which a failed exchange is recognised where torch raises a plain RuntimeError.
_SIGNS = ("gloo", "connection", "timed out", "timeout", "nccl")


class Peers:
    """Machine and process id of every process of the run. The constructor is collective."""

    def __init__(self) -> None:
        self.places = collectives.gathered((*_machine(), os.getpid()))
        # The launcher's process id; after its end this process has another parent.
        self.parent = os.getppid()

    def launcher_is_gone(self) -> bool:
        """Return whether the launcher that started this process has ended."""
        return processes.launched() is not None and os.getppid() != self.parent

    def ended(self) -> list[int]:
        """Return the ranks on this machine that have ended; other machines cannot be checked."""
        here = _machine()
        return [
            rank
            for rank, (*machine, process) in enumerate(self.places)
            if tuple(machine) == here and not is_running(process)
        ]

    def explain(self, error: RuntimeError, step: int) -> OSError | None:
        """Return an error that explains a failed exchange; None if `error` is something else."""
        has_sign = any(sign in str(error).lower() for sign in _SIGNS)
        if processes.world_size() == 1 or not (has_sign or isinstance(error, dist.DistError)):
            return None
        ended = self.ended()
        who = f"process {processes.rank()} of {processes.world_size()} on {_machine()[0]}"
        what = (
            f"process(es) {', '.join(map(str, ended))} on this machine ended"
            if ended
            else "another process, on another machine, ended or cannot be reached"
        )
        return OSError(
            f"{who} stops after step {step}: {what} ({processes.first_line(error)}). See that "
            "process's own output for why. Start all of them again with --resume_from_checkpoint "
            "latest."
        )


def _machine() -> tuple[str, str]:
    """Host name and process-id namespace: where both are equal, process ids can be compared."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return socket.gethostname(), space
