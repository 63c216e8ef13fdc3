"""Ranks of a gloo group on this machine's loopback, and a count of what they send.

results = run_ranks(function, 4, argument, seconds=600)    # function(rank, argument) by rank
"""

import os
import pickle
import re
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor, distributed, set_num_threads
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

LOOPBACK = "127.0.0.1"
# Pattern in the names of those functions of torch.distributed that send or receive.
COMMUNICATION = "gather|scatter|all_to_all|reduce|send|recv|broadcast"


def run_ranks(
    function: Callable[..., Any], num_ranks: int, *arguments: Any, seconds: float, threads: int = 1
) -> list[Any]:
    """Results of function(rank, *arguments) by rank, from new processes of one gloo group.

    function: defined at the top level of a module; arguments and results are pickled.
    threads: per rank.

    Raises:
        RuntimeError: a rank raised (with its traceback) or did not answer in time. All processes
            are ended in any case.
    """
    # Port 0 makes the system choose a free one, which no other process can take meanwhile.
    store = distributed.TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as directory:
        files = [Path(directory) / str(rank) for rank in range(num_ranks)]
        ranks = start_processes(
            _run_rank,
            (files, store.port, seconds, threads, function, arguments),
            nprocs=num_ranks,
            join=False,
            daemon=True,
        )
        end = time.monotonic() + seconds
        try:
            while not ranks.join(max(0.0, end - time.monotonic())):
                if time.monotonic() >= end:
                    silent = [rank for rank, file in enumerate(files) if not file.exists()]
                    raise RuntimeError(f"ranks {silent} gave no answer within {seconds:g} seconds")
        except (ProcessExitedException, ProcessRaisedException) as error:
            raise RuntimeError(f"rank {error.error_index} of {num_ranks}: {error}") from None
        finally:
            for process in ranks.processes:
                process.kill()
                process.join()
        return [pickle.loads(file.read_bytes()) for file in files]


def _run_rank(
    rank: int,
    files: list[Path],
    port: int,
    seconds: float,
    threads: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    set_num_threads(threads)
    distributed.init_process_group(
        "gloo", store=distributed.TCPStore(LOOPBACK, port, is_master=False), rank=rank,
        world_size=len(files), timeout=timedelta(seconds=seconds),
    )  # fmt: skip
    files[rank].write_bytes(pickle.dumps(function(rank, *arguments)))
    # A rank that leaves early would break the group of the others.
    distributed.barrier()
    distributed.destroy_process_group()


class Wire:
    """Count what this rank sends and receives with torch.distributed inside the block.

    A collective counts as a ring: all-gather and all-to-all of W parts as W - 1 messages of one
    part in each direction. Other collectives raise inside the block, so that none is missed.
    """

    def __init__(self) -> None:
        self.messages = self.sent_bytes = self.received_bytes = 0
        self._replaced = ExitStack()

    def __enter__(self) -> "Wire":
        # Function -> number of its tensors, and what counts them.
        counted: dict[str, tuple[int, Callable[..., None]]] = {
            "all_gather_into_tensor": (2, lambda _, sent: self._parts(sent, 1)),
            # all_gather_into_tensor is called all_gather_single since torch 2.13.
            "all_gather_single": (2, lambda _, sent: self._parts(sent, 1)),
            "all_to_all_single": (
                2, lambda _, sent: self._parts(sent, distributed.get_world_size())
            ),
            "isend": (1, lambda sent: self._add(1, sent.nbytes, 0)),
            "irecv": (1, lambda received: self._add(0, 0, received.nbytes)),
        }  # fmt: skip
        for name in dir(distributed):
            if name in counted or (name.islower() and re.search(COMMUNICATION, name)):
                function = _counting(name, *counted.get(name, (0, None)))
                self._replaced.enter_context(mock.patch.object(distributed, name, function))
        return self

    def __exit__(self, *_: object) -> None:
        self._replaced.close()

    def _parts(self, sent: Tensor, num_parts: int) -> None:
        others = distributed.get_world_size() - 1
        num_bytes = others * sent.nbytes // num_parts
        self._add(others, num_bytes, num_bytes)

    def _add(self, messages: int, sent: int, received: int) -> None:
        self.messages += messages
        self.sent_bytes += sent
        self.received_bytes += received


def _counting(name: str, num_tensors: int, count: Callable[..., None] | None) -> Callable[..., Any]:
    """The function that also counts its first tensors; without `count` it raises."""
    function = getattr(distributed, name)

    def counting(*arguments: Any, **more: Any) -> Any:
        if count is None:
            raise NotImplementedError(f"torch.distributed.{name} is not counted")
        count(*arguments[:num_tensors])
        return function(*arguments, **more)

    return counting


def loopback_bytes() -> int | None:
    """Bytes that all programs have sent over the loopback since boot; None if not on Linux."""
    try:
        lines = Path("/proc/net/dev").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = (line.split(":")[1].split() for line in lines if line.strip().startswith("lo:"))
    return next((int(fields[8]) for fields in found), None)
