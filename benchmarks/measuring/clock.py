"""Timing of several calls in turns, so that a busy machine slows all of them alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch

from .environment import CPU, Result

# Upper limit for the calls in a row that make one sample on a GPU.
MAX_REPEATS = 1000
# Lower limit of rounds that are reduced to save time.
MIN_ROUNDS = 3


def seconds(call: Callable[[], object]) -> float:
    """Seconds of one call on the CPU."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def seconds_per_call(
    function: Callable[[], object], repeats: int, device: torch.device = CPU
) -> list[float]:
    """A list of one sample: the mean seconds of `repeats` calls in a row."""
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
    all_seconds: float | None = None,
) -> dict[str, Result]:
    """Time every candidate once per round; a sample is the mean of several calls in a row.

    Each candidate is called as often in a row as fills `sample_seconds`, so that the wait is a
    small part of every sample even when candidates differ a thousandfold. With `all_seconds`, the
    candidates were called before, and there are fewer rounds if all would take longer.
    """
    turns, total = {}, 0.0
    for name, call in candidates.items():
        # The first call compiles; by the second one, memory is allocated and clocks are up.
        (seconds,) = seconds_per_call(call, 1, device)
        if all_seconds is None or seconds < sample_seconds:
            (seconds,) = seconds_per_call(call, 2, device)
        repeats = max(1, min(MAX_REPEATS, round(sample_seconds / seconds)))
        total += seconds * repeats
        turns[name] = partial(seconds_per_call, call, repeats, device)
    if all_seconds is not None and total > 0:
        rounds = min(rounds, max(MIN_ROUNDS, int(all_seconds / total)))
    return interleave_samples(turns, rounds=rounds)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all work it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave_samples(
    turns: Mapping[str, Callable[[], list[float]]], *, rounds: int, skip: int = 0
) -> dict[str, Result]:
    """Times of candidates that time themselves: a turn returns its samples in seconds.

    The first `skip` samples of every turn are dropped.
    """
    found = interleaved(turns, rounds=rounds, skip=skip)
    return {name: quantiles(values) for name, values in found.items()}


def interleaved(
    turns: Mapping[str, Callable[[], list[float]]], *, rounds: int, skip: int = 0
) -> dict[str, list[float]]:
    """The samples of `interleave_samples`."""
    samples: dict[str, list[float]] = {name: [] for name in turns}
    order = random.Random(0)
    for _ in range(rounds):
        # A candidate finds the cache and the memory as its predecessor left them, so the
        # predecessor changes from round to round.
        for name in order.sample(list(turns), len(turns)):
            samples[name] += turns[name]()[skip:]
    return samples


def quantiles(seconds: list[float]) -> Result:
    """p20, p50 and p80 in milliseconds, and the number of samples."""
    p20, p50, p80 = np.percentile(seconds, [20, 50, 80]) * 1e3
    return {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "samples": len(seconds)}


def ratio(times: dict[str, Result], slower: str, faster: str) -> float:
    """Median of `slower` divided by median of `faster`."""
    return times[slower]["p50_ms"] / times[faster]["p50_ms"]


def launches(function: Callable[[], object], device: torch.device) -> list[str] | None:
    """Names of the kernels, copies and fills that one call launches on the device, in order.

    None on a CPU, or if the profiler has no access to the GPU.
    """
    if device.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    # The first profile of a process may miss the first kernels.
    for _ in range(2):
        torch.cuda.synchronize(device)
        with torch.profiler.profile(activities=activities) as profiler:
            function()
            torch.cuda.synchronize(device)
    return [
        event.name
        for event in sorted(profiler.events(), key=lambda event: event.time_range.start)
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
    ] or None
