"""How much memory there is, and what one call takes at its peak.

On a GPU the allocator tells the peak. On a CPU a child process measures it by the high-water mark
of its resident memory (Linux: /proc/self/clear_refs resets the mark): freed memory goes back to the
system at once there, so that the mark shows what is held.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import re
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ..suites.suite import Suite

# glibc's name for the size from which memory comes from the system, and goes back to it.
M_MMAP_THRESHOLD = -3
# Where Linux does not tell.
DEFAULT_CACHE = 32 * 2**20
GPU_CACHE = 64 * 2**20
# A prediction leaves room for what else runs.
USABLE_SHARE = 0.9
# One call is not waited for longer than this.
CHILD_SECONDS = 300.0
END_SECONDS = 10.0


def cache_bytes(device: torch.device | None = None) -> int:
    """The last-level cache of the CPU, or the GPU's second level."""
    if device is not None and device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return int(getattr(properties, "L2_cache_size", GPU_CACHE))
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KM])\s*", file.read_text(encoding="ascii"))
        if match:
            sizes.append(int(match[1]) * {"K": 2**10, "M": 2**20}[match[2]])
    return max(sizes, default=DEFAULT_CACHE)


def available_bytes(device: torch.device) -> int:
    """What a run may take now; a CPU that does not tell is taken at its word: no limit."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        return int(USABLE_SHARE * free)
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return 2**62
    match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="ascii"))
    assert match is not None, "Linux reports MemAvailable"
    return int(USABLE_SHARE * int(match[1]) * 1024)


def too_large(needed: int, available: int) -> str | None:
    """Why it is refused, with both numbers, or None."""
    if needed <= available:
        return None
    return (
        f"does not fit: about {needed / 2**30:.2g} GiB by prediction, "
        f"{available / 2**30:.2g} GiB can be used"
    )


class Child:
    """A process that measures peaks, one after the other; started when first asked."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._process: Any = None
        self._pipe: Any = None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            # It ends by itself, and what it started with it.
            self._pipe.close()
            self._process.join(END_SECONDS)
        self._end()

    def peak(self, suite: Suite, name: str, case: Any) -> int | str | None:
        """Bytes by which one call of a provider raises the child's high-water mark.

        A text says why there is no number: a child that dies takes only its own measurement with
        it. None where the system tells no high-water mark.
        """
        if not Path("/proc/self/clear_refs").exists():
            return None
        if self._process is None:
            self._start()
        try:
            self._pipe.send((suite, name, case))
            if self._pipe.poll(CHILD_SECONDS):
                return self._pipe.recv()
            answer = f"no answer within {CHILD_SECONDS:g} seconds"
        except (EOFError, BrokenPipeError, ConnectionResetError):
            answer = "the process that measures memory ended without an answer"
        self._end()
        return answer

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, self.threads), daemon=True)
        self._process.start()
        other.close()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None


def _serve(pipe: Connection, threads: int) -> None:
    torch.set_num_threads(threads)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 64 * 1024)
    while True:
        try:
            suite, name, case = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(_extra(suite, name, case, libc))
        except Exception as error:
            # A call that fails here is named beside its times; the others go on.
            pipe.send(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")


def _extra(suite: Suite, name: str, case: Any, libc: Any) -> int:
    device = torch.device("cpu")
    provider = next((each for each in suite.providers(case, device) if each.name == name), None)
    if provider is None:
        raise ValueError(f"{suite.words(case)} has no provider {name!r}.")
    call = provider.make(case, device)
    (inputs,) = suite.inputs(case, device, 1)
    # Libraries, compilers, threads and workspaces come with the first call.
    call(inputs)
    return _raised_by(lambda: call(inputs), libc)


def _raised_by(function: Callable[[], object], libc: Any) -> int:
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status_bytes("VmRSS")
    result = function()
    raised = _status_bytes("VmHWM") - before
    del result
    return raised


def _status_bytes(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None, f"Linux reports {field}"
    return int(match[1]) * 1024


def extra_device_memory(function: Callable[[], object], device: torch.device) -> int | None:
    """Bytes by which one call, made before, raises the device's allocated memory at its peak.

    None on a CPU (`extra_memory` measures there).
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
