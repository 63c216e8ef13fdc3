"""The processes of a run: ranks from the launcher, start of torch.distributed, timeouts."""

from __future__ import annotations

import os
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from .text import first_line

TIMEOUT_SECONDS = 600.0
# Time for all processes to start and to connect.
MEETING_SECONDS = 60.0
# Time beyond it in which torch may report the timeout itself.
GRACE_SECONDS = 5.0
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """Rank of a process, number of processes, and rank among those of this machine."""

    rank: int
    world_size: int
    local_rank: int


def launched() -> Launch | None:
    """Read the variables set by torchrun or the deepspeed launcher; None without a launcher.

    Raises:
        ValueError: a launcher's variables are incomplete or contradict each other.
    """
    found = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
    if not {"RANK", "WORLD_SIZE"} & found.keys():
        return None
    if missing := [name for name in _VARIABLES if name not in found]:
        raise ValueError(
            f"{', '.join(found)} are set but {', '.join(missing)} are not: start with torchrun or "
            "deepspeed, which set all of them, or unset them for a run of one process."
        )
    numbers = []
    for name in _VARIABLES[:3]:
        try:
            numbers.append(int(found[name]))
        except ValueError:
            raise ValueError(f"{name}={found[name]!r} is not a number.") from None
    launch = Launch(*numbers)
    if not 0 <= launch.rank < launch.world_size:
        raise ValueError(
            f"RANK={launch.rank} must lie in 0 .. WORLD_SIZE - 1 = {launch.world_size - 1}."
        )
    return launch


def join(device: str = "auto", timeout_seconds: float = TIMEOUT_SECONDS) -> torch.device:
    """Start torch.distributed and return this process's device; without a launcher, alone.

    Args:
        device: auto, cpu or cuda. On a machine with several GPUs each process takes its own.
        timeout_seconds: limit for every exchange after the start; a process that waits longer ends
            with an error, so that a dead process ends the run and does not hang it.

    Raises:
        ValueError: a launcher's variables are wrong, a GPU is missing, or the network interface
            that the environment names does not exist here.
        OSError: processes did not start within `MEETING_SECONDS` (they are named) or cannot be
            reached.
    """
    launch = launched()
    where = _device(device, launch.local_rank if launch else 0)
    if dist.is_initialized():
        return where
    backend, interface = "gloo", "GLOO_SOCKET_IFNAME"
    if where.type == "cuda":
        backend, interface = "nccl", "NCCL_SOCKET_IFNAME"
        torch.cuda.set_device(where)
    if launch is None:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return where
    name, known = os.environ.get(interface), [name for _, name in socket.if_nameindex()]
    # Gloo only: NCCL's variable may also hold prefixes and lists.
    if backend == "gloo" and name and name not in known:
        raise ValueError(
            f"{interface}={name}: {socket.gethostname()} has no such network interface. It has "
            f"{', '.join(known)}."
        )
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    who = f"process {launch.rank} of {launch.world_size} on {socket.gethostname()}"
    meeting = timedelta(seconds=MEETING_SECONDS)
    try:
        store = _store(launch, meeting)
        if missing := _missing(store, launch):
            raise OSError(
                f"{who}: process(es) {', '.join(map(str, missing))} did not connect to {place} "
                f"within {MEETING_SECONDS:g} s. Start all of them, on every machine, at about the "
                "same time."
            )
        # This also makes the connections between the processes.
        dist.init_process_group(
            backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=meeting
        )
        barrier()
    # torch raises network errors as RuntimeErrors.
    except (RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error):
            raise OSError(
                f"{who}: port {os.environ['MASTER_PORT']} of this machine is in use by another "
                "program. Name a free one: MASTER_PORT, or --master_port of the launcher."
            ) from error
        raise OSError(
            f"{who} could not connect to the others at {place} within {MEETING_SECONDS:g} s: "
            f"{first_line(error).removesuffix('.')}. Check that this address can be reached from "
            f"every machine, and, where a machine has several networks, that {interface} names the "
            "right one."
        ) from error
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_seconds))
    return where


def _store(launch: Launch, meeting: timedelta) -> dist.Store:
    """Connect to the rendezvous store, which torchrun or else process 0 opens.

    `init_process_group` would open one itself, but could not say which process is missing.
    """
    is_torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    made: list[dist.Store | Exception] = []

    def connect() -> None:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        opens = launch.rank == 0 and not is_torchruns
        try:
            made.append(
                dist.TCPStore(
                    address, port, is_master=opens, wait_for_workers=False, timeout=meeting
                )
            )
        except Exception as error:
            made.append(error)

    # TCPStore's timeout does not apply once a connection is accepted, for example by another
    # program's server that never answers.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(meeting.total_seconds() + GRACE_SECONDS)
    if not made:
        raise RuntimeError("What listens there is no process of this run: it does not answer.")
    store = made[0]
    if isinstance(store, Exception):
        raise store
    # A restarted run must not read the keys of the run before.
    return dist.PrefixStore(f"fusedacl{os.environ.get('TORCHELASTIC_RESTART_COUNT', '')}", store)


def _missing(store: dist.Store, launch: Launch) -> list[int]:
    """Return the ranks that did not start in time."""
    store.set(f"process {launch.rank}", socket.gethostname())
    missing = list(range(launch.world_size))
    end = time.monotonic() + MEETING_SECONDS
    while missing and time.monotonic() < end:
        missing = [rank for rank in missing if not store.check([f"process {rank}"])]
        time.sleep(0.1)
    return missing


def world_size() -> int:
    """Return the number of processes; 1 before `join`."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return this process's rank, 0 .. world_size() - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()


def leave() -> None:
    """Close the connections; without this, torch may print warnings when the process ends."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(name: str, local_rank: int) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(
            f"LOCAL_RANK={local_rank}: torch sees {count} GPU(s) on "
            f"{socket.gethostname()}. Start at most that many processes there, or use device=cpu."
        )
    return torch.device("cuda", local_rank)
