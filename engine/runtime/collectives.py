"""Collective operations of a run's processes, and explanations of failed ones.

Every process must call them in the same order; in a run of one process they exchange nothing.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import processes
from .lock import is_running
from .text import first_line

Result = TypeVar("Result")
# Words by which a failed exchange is recognised where torch raises a plain RuntimeError.
_SIGNS = ("gloo", "connection", "timed out", "timeout", "nccl")


def group() -> dist.ProcessGroup | None:
    """Return the group of all processes, None in a run of one process."""
    return dist.group.WORLD if processes.world_size() > 1 else None


def gathered(value: Any) -> list[Any]:
    """Return the value of every process, by rank."""
    if processes.world_size() == 1:
        return [value]
    values: list[Any] = [None] * processes.world_size()
    dist.all_gather_object(values, value)
    return values


def total(values: Tensor) -> Tensor:
    """Return the sum over the processes."""
    if processes.world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def largest(number: int, device: torch.device) -> int:
    """Return the largest number of any process."""
    if processes.world_size() == 1:
        return number
    tensor = torch.tensor(number, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def together(action: Callable[[], Result]) -> Result:
    """Run `action` on every process and return this process's result.

    Raises:
        ValueError, OSError: it failed on some process, which is named. All processes raise, so that
            none waits for the failed one until the timeout.
    """
    result, told = None, None
    try:
        result = action()
    except (ValueError, OSError) as error:
        if processes.world_size() == 1:
            raise
        told = isinstance(error, ValueError), str(error)
    answers = gathered((socket.gethostname(), told))
    for rank, (host, found) in enumerate(answers):
        if found is not None:
            is_mistake, message = found
            # Where every process fails in the same way, the message names none of them.
            if any(other != found for _, other in answers):
                message = f"Process {rank} on {host}: {message}"
            raise ValueError(message) if is_mistake else OSError(message)
    return result  # type: ignore[return-value]


def from_first(make: Callable[[], Result]) -> Result:
    """Run `make` on process 0 and return its result on every process.

    Raises:
        ValueError, OSError: it failed on process 0.
    """
    made = together(lambda: make() if processes.rank() == 0 else None)
    values = [made]
    if processes.world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]  # type: ignore[return-value]


def check_alike(values: Mapping[str, Any], remedy: str = "") -> None:
    """Refuse a run whose processes have different values. Collective.

    Args:
        values: name -> value; a name that another process lacks stands for None there.
        remedy: a sentence for the end of the message.

    Raises:
        ValueError: naming the first process that differs from process 0, and both values.
    """
    (first_host, first), *others = gathered((socket.gethostname(), dict(values)))
    for rank, (host, other) in enumerate(others, start=1):
        for name in [*first, *other]:
            mine, theirs = first.get(name), other.get(name)
            if mine != theirs:
                raise ValueError(
                    f"{name}: process 0 on {first_host} has {mine}, process {rank} on {host} has "
                    f"{theirs}. All processes of a run need the same. {remedy}".rstrip()
                )


def check_shared(directory: Path) -> None:
    """Refuse an `output_dir` that is another directory on some machine. Collective.

    Raises:
        ValueError: naming a process that does not see what process 0 writes there.
        OSError: process 0 cannot write there.
    """

    def leave_token() -> Path:
        # An earlier run may have left a file of a fixed name on another machine.
        token = directory / f".shared-{secrets.token_hex(8)}"
        token.touch()
        return token

    def see() -> None:
        if not token.exists():
            raise ValueError(
                f"output_dir={str(directory)!r} is not the directory that process 0 writes to: it "
                "must lie on a file system that all processes share."
            )

    if processes.world_size() == 1:
        return
    token = from_first(leave_token)
    try:
        together(see)
    finally:
        if processes.rank() == 0:
            token.unlink(missing_ok=True)


class Peers:
    """Machine and process id of every process of the run. The constructor is collective."""

    def __init__(self) -> None:
        self.places = gathered((*_machine(), os.getpid()))
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
            f"{who} stops after step {step}: {what} ({first_line(error)}). See that "
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
