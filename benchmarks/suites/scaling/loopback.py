"""Ranks of a gloo group on this machine's loopback, and a count of what they send.

results = run_ranks(function, 4, argument, seconds=600)    # function(rank, argument) by rank
"""

import multiprocessing
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, distributed

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
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(num_ranks)]
    processes = [
        context.Process(
            target=_serve,
            args=(sender, rank, num_ranks, store.port, seconds, threads, function, arguments),
            daemon=True,
        )
        for rank, (_, sender) in enumerate(pipes)
    ]
    try:
        for process, (_, sender) in zip(processes, pipes, strict=True):
            process.start()
            sender.close()
        return _collect([receiver for receiver, _ in pipes], seconds)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def _collect(receivers: list[Any], seconds: float) -> list[Any]:
    end = time.monotonic() + seconds
    ranks = {receiver: rank for rank, receiver in enumerate(receivers)}
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        waiting = [receiver for receiver, rank in ranks.items() if rank not in results]
        ready = connection.wait(waiting, timeout=max(0.0, end - time.monotonic()))
        if not ready:
            silent = [ranks[receiver] for receiver in waiting]
            raise RuntimeError(f"ranks {silent} gave no answer within {seconds:g} seconds")
        for receiver in waiting:
            if receiver not in ready:
                continue
            rank = ranks[receiver]
            try:
                failed, results[rank] = receiver.recv()
            except EOFError:
                raise RuntimeError(f"rank {rank} ended without an answer") from None
            if failed:
                raise RuntimeError(f"rank {rank} of {len(receivers)}: {results[rank]}")
    return [results[rank] for rank in range(len(receivers))]


def _serve(
    sender: Any,
    rank: int,
    num_ranks: int,
    port: int,
    seconds: float,
    threads: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(threads)
    try:
        store = distributed.TCPStore(LOOPBACK, port, is_master=False)
        distributed.init_process_group(
            "gloo", store=store, rank=rank, world_size=num_ranks,
            timeout=timedelta(seconds=seconds),
        )  # fmt: skip
        answer = (False, function(rank, *arguments))
    except BaseException:
        answer = (True, traceback.format_exc())
    sender.send(answer)
    # The parent ends all ranks together: a rank that leaves early would break the others' group.
    threading.Event().wait()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class Wire:
    """Count what this rank sends and receives with torch.distributed inside the block.

    A collective counts as a ring: all-gather and all-to-all of W parts as W - 1 messages of one
    part in each direction. Other collectives raise inside the block, so that none is missed.
    """

    def __init__(self) -> None:
        self.messages = self.sent_bytes = self.received_bytes = 0
        self._kept: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> "Wire":
        counted: dict[str, Callable[..., None]] = {
            "all_gather_into_tensor": lambda _, sent: self._parts(sent, 1),
            # all_gather_into_tensor is called all_gather_single since torch 2.13.
            "all_gather_single": lambda _, sent: self._parts(sent, 1),
            "all_to_all_single": lambda _, sent: self._parts(sent, distributed.get_world_size()),
            "isend": lambda sent: self._add(1, bytes_of(sent), 0),
            "irecv": lambda received: self._add(0, 0, bytes_of(received)),
        }
        for name in dir(distributed):
            if name in counted:
                self._replace(name, self._counting(getattr(distributed, name), counted[name]))
            elif name.islower() and re.search(COMMUNICATION, name):
                self._replace(name, self._refusing(name))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name, function in self._kept.items():
            setattr(distributed, name, function)

    def _replace(self, name: str, function: Callable[..., Any]) -> None:
        self._kept[name] = getattr(distributed, name)
        setattr(distributed, name, function)

    def _counting(
        self, function: Callable[..., Any], count: Callable[..., None]
    ) -> Callable[..., Any]:
        num_tensors = 1 if function.__name__ in ("isend", "irecv") else 2

        def counting(*arguments: Any, **more: Any) -> Any:
            count(*arguments[:num_tensors])
            return function(*arguments, **more)

        return counting

    def _refusing(self, name: str) -> Callable[..., Any]:
        def refusing(*_: Any, **__: Any) -> Any:
            raise NotImplementedError(f"torch.distributed.{name} is not counted")

        return refusing

    def _parts(self, sent: Tensor, num_parts: int) -> None:
        others = distributed.get_world_size() - 1
        num_bytes = others * bytes_of(sent) // num_parts
        self._add(others, num_bytes, num_bytes)

    def _add(self, messages: int, sent: int, received: int) -> None:
        self.messages += messages
        self.sent_bytes += sent
        self.received_bytes += received


def bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def loopback_bytes() -> int | None:
    """Bytes that all programs have sent over the loopback since boot; None if not on Linux."""
    try:
        lines = Path("/proc/net/dev").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = (line.split(":")[1].split() for line in lines if line.strip().startswith("lo:"))
    return next((int(fields[8]) for fields in found), None)
