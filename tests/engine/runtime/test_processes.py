"""Ranks from the environment of each launcher, and errors when other processes do not come."""

from __future__ import annotations

import socket
import time

import pytest
import torch
from fusedacl.engine.runtime import processes
from fusedacl.engine.runtime.processes import Launch, join, launched

VARIABLES = {
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}  # fmt: skip


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The variables of a launcher."""
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_launched(environment: pytest.MonkeyPatch) -> None:
    assert launched() == Launch(1, 2, 0)
    environment.setenv("RANK", "2")
    with pytest.raises(ValueError, match="RANK=2 must lie in 0 .. WORLD_SIZE - 1 = 1"):
        launched()
    environment.setenv("RANK", "one")
    with pytest.raises(ValueError, match="RANK='one' is not a number"):
        launched()
    environment.setenv("RANK", "1")
    environment.delenv("MASTER_PORT")
    with pytest.raises(ValueError, match="MASTER_PORT are not: start with torchrun"):
        launched()


def test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert launched() is None
    assert not torch.distributed.is_initialized()
    try:
        assert join("cpu") == torch.device("cpu")
        assert (processes.rank(), processes.world_size()) == (0, 1)
        processes.barrier()
        # Twice is as good as once.
        assert join("cpu") == torch.device("cpu")
    finally:
        processes.leave()
    assert processes.world_size() == 1


def test_nobody_comes(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("RANK", "0")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        environment.setenv("MASTER_PORT", str(found.getsockname()[1]))
    environment.setattr(processes, "MEETING_SECONDS", 2.0)
    started = time.monotonic()
    with pytest.raises(OSError, match="process 0 of 2 .* 1 did not connect to 127.0.0.1:.* 2 s"):
        join("cpu")
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        ("0", "port .* is in use by another program. Name a free one: MASTER_PORT"),
        ("1", "no process of this run: it does not answer"),
    ],
)
def test_another_program_has_the_port(
    environment: pytest.MonkeyPatch, rank: str, message: str
) -> None:
    environment.setenv("RANK", rank)
    environment.setattr(processes, "MEETING_SECONDS", 1.0)
    environment.setattr(processes, "GRACE_SECONDS", 0.5)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        environment.setenv("MASTER_PORT", str(other.getsockname()[1]))
        started = time.monotonic()
        with pytest.raises(OSError, match=message):
            join("cpu")
    assert time.monotonic() - started < 30


def test_more_processes_than_gpus(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("LOCAL_RANK", "99")
    with pytest.raises(ValueError, match="LOCAL_RANK=99: torch sees .* Start at most that many"):
        join("cuda")
