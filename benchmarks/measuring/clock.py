"""Interleaved timing, high-water marks of memory, and the file a benchmark leaves."""

from __future__ import annotations

import argparse
import multiprocessing
import random
import time
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .environment import CPU, Result, machine_name
from .memory import _status_bytes

# Calls in a row in a sample on a GPU.
MAX_REPEATS = 1000


def command_line(
    description: str | None, more: Mapping[str, Mapping[str, Any]] | None = None
) -> argparse.Namespace:
    """The options all of these benchmarks share; sets the number of threads.

    `more`: options of one benchmark, each with its arguments for argparse.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds, no file")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path(__file__).parents[1] / "results" / machine_name(),
        help="where the JSON file goes (default: %(default)s)",
    )
    for name, settings in (more or {}).items():
        parser.add_argument(name, **settings)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    return arguments


def interleave(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int, repeats: int = 1
) -> dict[str, Result]:
    """Times every candidate once a round, so that a busy machine slows all of them alike.

    A sample is the mean of `repeats` calls in a row; every candidate is called that often before.
    """
    turns = {name: partial(_seconds_per_call, call, repeats) for name, call in candidates.items()}
    for turn in turns.values():
        turn()
    return interleave_samples(turns, rounds=rounds)


def seconds(call: Callable[[], object]) -> float:
    """Of one call on the CPU."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _seconds_per_call(
    function: Callable[[], object], repeats: int, device: torch.device = CPU
) -> list[float]:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    synchronize(device)
    return [(time.perf_counter() - start) / repeats]


def interleave_on(
    device: torch.device,
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    sample_seconds: float = 0.02,
) -> dict[str, Result]:
    """`interleave` for calls that leave work to a device, which is waited for around a sample.

    Candidates may differ a thousandfold, so each is called as often in a row as fills
    `sample_seconds`: the wait at the end then does not count.
    """
    turns = {}
    for name, call in candidates.items():
        # The first call compiles, the second finds memory and clocks as they will be.
        _seconds_per_call(call, 1, device)
        (seconds,) = _seconds_per_call(call, 2, device)
        repeats = max(1, min(MAX_REPEATS, round(sample_seconds / seconds)))
        turns[name] = partial(_seconds_per_call, call, repeats, device)
    return interleave_samples(turns, rounds=rounds)


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave_samples(
    turns: Mapping[str, Callable[[], list[float]]], *, rounds: int, skip: int = 0
) -> dict[str, Result]:
    """`interleave` for candidates that time themselves: a turn returns its samples in seconds.

    The first `skip` samples of every turn are left out.
    """
    samples: dict[str, list[float]] = {name: [] for name in turns}
    order = random.Random(0)
    for _ in range(rounds):
        # Who comes next finds cache and memory as the last one left them, and what the system does
        # afterwards: not always the same.
        for name in order.sample(list(turns), len(turns)):
            samples[name] += turns[name]()[skip:]
    return {name: quantiles(values) for name, values in samples.items()}


def quantiles(seconds: list[float]) -> Result:
    """p20, p50 and p80 in milliseconds, and how many samples."""
    p20, p50, p80 = np.percentile(seconds, [20, 50, 80]) * 1e3
    return {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "samples": len(seconds)}


def ratio(times: dict[str, Result], slower: str, faster: str) -> float:
    """How many times faster, by medians."""
    return times[slower]["p50_ms"] / times[faster]["p50_ms"]


def extra_memory(prepare: Callable[..., Callable[[], object]], *arguments: Any) -> int:
    """Bytes by which one call raises a fresh process's high-water mark of resident memory.

    `prepare(*arguments)` runs in the new process, makes the inputs and returns the call. The mark
    is reset between the two (Linux: /proc/self/clear_refs), so libraries and inputs do not count.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report_memory, args=(sender, prepare, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError("the process that measures memory ended without an answer") from None
    finally:
        process.join()


def _report_memory(
    sender: Connection, prepare: Callable[..., Callable[[], object]], arguments: tuple[Any, ...]
) -> None:
    function = prepare(*arguments)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    function()
    sender.send(_status_bytes("VmHWM") - before)


def launches(function: Callable[[], object], device: torch.device) -> list[str] | None:
    """Names of the kernels, copies and fills that one call gives to the device, in order.

    None on a CPU, or where the profiler may not look.
    """
    if device.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    # The first profile of a process may miss what it starts with.
    for _ in range(2):
        torch.cuda.synchronize(device)
        with torch.profiler.profile(activities=activities) as profiler:
            function()
            torch.cuda.synchronize(device)
    on_device = [
        event
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
    ]
    on_device.sort(key=lambda event: event.time_range.start)
    return [event.name for event in on_device] or None
