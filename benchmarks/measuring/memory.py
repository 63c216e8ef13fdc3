"""Available memory, and the peak memory of one call.

On a GPU the allocator reports the peak. On a CPU it is the high-water mark of the resident memory
of a child process, which Linux can reset (/proc/self/clear_refs).
"""

from __future__ import annotations

import ctypes
import multiprocessing
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ...engine.runtime import processes

RESET_FILE = Path("/proc/self/clear_refs")
STATUS_FILE = Path("/proc/self/status")
# mallopt's parameter (glibc): allocations above this size are returned to the system when freed.
M_MMAP_THRESHOLD = -3
# Used if Linux does not report the size.
DEFAULT_CACHE = 32 * 2**20
GPU_CACHE = 64 * 2**20
# The rest of the free memory is left to other programs.
USABLE_SHARE = 0.9
CHILD_SECONDS = 300.0
END_SECONDS = 10.0


def cache_bytes(device: torch.device | None = None) -> int:
    """Size of the CPU's last-level cache, or of the GPU's L2 cache."""
    if device is not None and device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return int(getattr(properties, "L2_cache_size", GPU_CACHE))
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    found = (re.fullmatch(r"(\d+)([KM])\s*", file.read_text(encoding="ascii")) for file in files)
    sizes = (int(size[1]) * {"K": 2**10, "M": 2**20}[size[2]] for size in found if size)
    return max(sizes, default=DEFAULT_CACHE)


def available_bytes(device: torch.device) -> int:
    """Memory that a run may use now; no limit (2**62) on a system that does not report it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        return int(USABLE_SHARE * free)
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return 2**62
    return int(USABLE_SHARE * _reported_bytes(meminfo, "MemAvailable"))


def _reported_bytes(file: Path, field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", file.read_text(encoding="ascii"))
    assert match is not None, f"Linux reports {field}"
    return int(match[1]) * 1024


def too_large(needed: int, available: int) -> str | None:
    """A message with both numbers if the need exceeds what is available, else None."""
    if needed <= available:
        return None
    return (
        f"does not fit: about {needed / 2**30:.2g} GiB by prediction, "
        f"{available / 2**30:.2g} GiB can be used"
    )


class HighWaterMark:
    """Peak of this process's resident memory since `reset`, beyond what it held at that moment."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        # Freed memory that stays with the process would hide what the next call needs.
        if hasattr(self._libc, "mallopt"):
            self._libc.mallopt(M_MMAP_THRESHOLD, 64 * 1024)

    @staticmethod
    def is_available() -> bool:
        return RESET_FILE.exists()

    def reset(self) -> None:
        if hasattr(self._libc, "malloc_trim"):
            self._libc.malloc_trim(0)
        RESET_FILE.write_text("5", encoding="ascii")
        self._before = _reported_bytes(STATUS_FILE, "VmRSS")

    def raised_bytes(self) -> int:
        return _reported_bytes(STATUS_FILE, "VmHWM") - self._before

    def raised_by(self, call: Callable[[], object]) -> int:
        """Bytes by which one call raises the mark; its result is held until the mark is read."""
        self.reset()
        result = call()
        raised = self.raised_bytes()
        del result
        return raised


class Child(AbstractContextManager["Child"]):
    """A process that measures memory peaks, one after another; it starts at the first request."""

    def __init__(self, threads: int, seconds: float = CHILD_SECONDS) -> None:
        self.threads = threads
        self.seconds = seconds
        self._process: Any = None
        self._pipe: Any = None

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            # A closed pipe ends the child, and with it the processes that it started.
            self._pipe.close()
            self._process.join(END_SECONDS)
        self._end()

    def measure(self, function: Callable[..., int], *arguments: Any) -> int | str | None:
        """Result of `function(*arguments)` in the child.

        function: defined at the top level of a module; it and its arguments are pickled.

        Returns:
            An error message if the function raised, the child ended or `seconds` passed; the next
            request then starts a new child. None if the system has no high-water mark.
        """
        if not HighWaterMark.is_available():
            return None
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, other = context.Pipe()
            self._process = context.Process(target=_serve, args=(other, self.threads), daemon=True)
            self._process.start()
            other.close()
        try:
            self._pipe.send((function, arguments))
            if self._pipe.poll(self.seconds):
                return self._pipe.recv()
            answer = f"no answer within {self.seconds:g} seconds"
        except (EOFError, BrokenPipeError, ConnectionResetError):
            answer = "the process that measures memory ended without an answer"
        self._end()
        return answer

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None


def _serve(pipe: Connection, threads: int) -> None:
    torch.set_num_threads(threads)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send(function(*arguments))
        except Exception as error:
            # Reported beside the times of this provider; the others are still measured.
            pipe.send(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
    # A run under DeepSpeed leaves a process group behind.
    processes.leave()


def extra_device_memory(function: Callable[[], object], device: torch.device) -> int | None:
    """Bytes by which one call raises the GPU allocator's peak; None on a CPU.

    The function must have been called before, so that what it keeps does not count.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
