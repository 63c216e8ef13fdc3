"""Ranks of a gloo process group: processes on this machine that many tests share.

    with Ranks(4) as ranks:
        results = ranks.run(function, argument)     # function(rank, argument) on every rank

A rank that raises is reported with its traceback. All ranks end when one does not answer in time
and when the block is left; a rank whose parent is gone ends by itself.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import inspect
import os
import pickle
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

LOOPBACK = "127.0.0.1"
# Each rank imports torch, at the same time as the others and on a busy machine.
START_SECONDS = 240.0
RUN_SECONDS = 120.0
# Time for the other ranks to answer after one has failed.
GRACE_SECONDS = 10.0
# Timeout of a collective: longer than a test on a busy machine, shorter than RUN_SECONDS, so that a
# rank that waits in vain reports it.
COLLECTIVE_SECONDS = 60.0


class Ranks(contextlib.AbstractContextManager["Ranks"]):
    """Processes of one gloo group, with the environment variables that a launcher sets."""

    def __init__(self, num_ranks: int, collective_seconds: float = COLLECTIVE_SECONDS) -> None:
        from torch.distributed import TCPStore

        self.num_ranks = num_ranks
        # Port 0: the system chooses a free port, and no other process can take it meanwhile.
        self.store = TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
        common = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "MASTER_ADDR": LOOPBACK,
            "MASTER_PORT": str(self.store.port),
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "OMP_NUM_THREADS": "1",
            # The ranks use the CPU, where Triton's interpreter runs the kernels.
            "CUDA_VISIBLE_DEVICES": "",
            "TRITON_INTERPRET": "1",
        }
        if sys.platform == "linux":
            common["GLOO_SOCKET_IFNAME"] = "lo"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.connections: list[Connection] = []
        for rank in range(num_ranks):
            ours, theirs = Pipe()
            self.connections.append(ours)
            # Only the rank holds the other end: when it dies, the pipe is closed.
            with theirs:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, __file__, str(theirs.fileno()), str(collective_seconds)],
                        env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        pass_fds=[theirs.fileno()],
                    )
                )
        try:
            for rank, connection in enumerate(self.connections):
                assert connection.poll(START_SECONDS), f"rank {rank} has not started in time"
                assert connection.recv() == rank
        except BaseException:
            self.close()
            raise

    def run(
        self, function: Callable[..., Any], *arguments: Any, seconds: float = RUN_SECONDS
    ) -> list[Any]:
        """Call function(rank, *arguments) on every rank; return the results, ordered by rank.

        function: defined at the top level of a module, whose file each rank imports. Arguments and
        results are pickled.

        Raises:
            AssertionError: with the traceback of every rank that raised, and the ranks that did not
                answer in time. If a rank is late or has died, all ranks are ended.
        """
        assert not self.closed, "these ranks have been ended"
        task = pickle.dumps((inspect.getfile(function), function.__name__, arguments))
        for connection in self.connections:
            connection.send_bytes(task)
        end = time.monotonic() + seconds
        results: list[Any] = [None] * self.num_ranks
        failures: list[str] = []
        waiting = dict(zip(self.connections, range(self.num_ranks), strict=True))
        while waiting and (ready := wait(list(waiting), max(0.0, end - time.monotonic()))):
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    raised, results[rank] = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    raised, results[rank] = True, "it has ended"
                if raised:
                    failures.append(f"rank {rank}: {results[rank]}")
                    # The others may be waiting for it in a collective.
                    end = min(end, time.monotonic() + GRACE_SECONDS)
        if waiting:
            failures.append(f"no answer in time from ranks {sorted(waiting.values())}")
        if waiting or any(process.poll() is not None for process in self.processes):
            self.close()
        assert not failures, "\n".join(failures)
        return results

    @property
    def closed(self) -> bool:
        return not self.connections

    def close(self) -> None:
        """End all ranks: close their connections, then kill those that are still there."""
        for connection in self.connections:
            connection.close()
        asked = bool(self.connections)
        self.connections = []
        for process in self.processes:
            try:
                process.wait(5.0 if asked else 0.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def __exit__(self, *_: object) -> None:
        self.close()


def load(path: Path) -> ModuleType:
    """Import a file by its own name: those that pytest gives to modules are unknown here."""
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    return importlib.import_module(path.stem)


def serve(connection: Connection, collective_seconds: float) -> None:
    """Join the group, then answer requests until the parent closes the connection."""
    import torch

    torch.set_num_threads(1)
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = torch.distributed.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False
    )
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=num_ranks,
        timeout=timedelta(seconds=collective_seconds),
    )  # fmt: skip
    connection.send(rank)
    linear = torch.nn.functional.linear
    num_modules = 0
    while True:
        try:
            path, name, arguments = pickle.loads(connection.recv_bytes())
        except (EOFError, ConnectionError):
            break
        try:
            torch.manual_seed(0)
            function = getattr(load(Path(path)), name)
            if len(sys.modules) != num_modules:
                num_modules = len(sys.modules)
                # DeepSpeed collects garbage in ZeRO 3: a second for each time among all modules.
                gc.freeze()
            answer = (False, function(rank, *arguments))
        except BaseException:
            answer = (True, traceback.format_exc())
        # DeepSpeed's ZeRO 3 leaves one of its own, which rounds otherwise, to the next request.
        torch.nn.functional.linear = linear
        connection.send_bytes(pickle.dumps(answer))
    # No regular exit: the process group would make this rank wait for one that was killed.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), float(sys.argv[2]))
