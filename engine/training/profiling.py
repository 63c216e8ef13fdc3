"""The time of each part of a training step, measured by torch.profiler.

The engine marks the parts of a step (`profiler_marks`); `StepProfiler` profiles some steps of a
run. Parts may be nested: an instant belongs to the part that began last, so that no time counts
twice and the shares add up to 1.
"""

import contextlib
import logging
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ..runtime.files import write_json
from ..runtime.profiler_marks import COMMUNICATION, OTHER, PREFIX, STEP, WORDS, mark_parts, part
from ..runtime.text import text_table

logger = logging.getLogger("fusedacl")
# Steps of a run before the profiled ones; the profiler itself warms up in the last of them.
WARM_UP = 3
PROFILE_FILE = "profile.json"
TRACE_FILE = "trace.json.gz"
SCHEMA = 1

# Prefixes of the events of torch.distributed's collectives.
_EXCHANGES = ("gloo:", "nccl:")


class Interval(NamedTuple):
    """A part of a step, from `start` to `end` in microseconds."""

    name: str
    start: float
    end: float


class Timeline:
    """Assigns each instant of some steps to a part.

    intervals: the steps, named "step", and the parts on any thread. Time outside steps is ignored.
    """

    def __init__(self, intervals: Iterable[Interval]) -> None:
        # If several begin together, the shorter ones are nested in the longer ones.
        ordered = sorted(intervals, key=lambda interval: (interval.start, -interval.end))
        changes = [(time, i) for i, (_, *ends) in enumerate(ordered) for time in ends]
        open_ones: set[int] = set()
        self._starts: list[float] = []
        self._parts: list[str | None] = []
        for time, index in sorted(changes):
            open_ones ^= {index}
            names = [ordered[i].name for i in open_ones]
            name = ordered[max(open_ones)].name if STEP in names else None
            self._starts.append(time)
            self._parts.append(OTHER if name == STEP else name)

    def part_at(self, time: float) -> str | None:
        """The name of the part; None outside steps."""
        index = bisect_right(self._starts, time) - 1
        return self._parts[index] if index >= 0 else None

    def seconds(self) -> dict[str, float]:
        """Seconds of each part; their sum is the time of the steps."""
        totals = dict.fromkeys(WORDS, 0.0)
        for index, name in enumerate(self._parts[:-1]):
            if name is not None:
                totals[name] += (self._starts[index + 1] - self._starts[index]) * 1e-6
        return totals


def find_intervals(events: Iterable[Any]) -> Iterator[Interval]:
    """The marked parts and the collectives among the events of a profiler."""
    for event in events:
        if event.device_type == DeviceType.CPU and event.name.startswith((PREFIX, *_EXCHANGES)):
            is_mark = event.name.startswith(PREFIX)
            name = event.name.removeprefix(PREFIX) if is_mark else COMMUNICATION
            yield Interval(name, event.time_range.start, event.time_range.end)


def device_seconds(events: Iterable[Any], timeline: Timeline) -> dict[str, float]:
    """Seconds of the kernels and copies that each part launched, from any thread."""
    totals = dict.fromkeys(WORDS, 0.0)
    for event in events:
        name = timeline.part_at(event.time_range.start)
        if event.device_type != DeviceType.CPU or name is None:
            continue
        for kernel in event.kernels:
            # Marks appear among the kernels too, from their first kernel to their last.
            if not kernel.name.startswith(PREFIX):
                exchanged = kernel.name.lower().startswith("nccl")
                totals[COMMUNICATION if exchanged else name] += kernel.duration * 1e-6
    return totals


def summarize(events: Iterable[Any], device: torch.device) -> dict[str, Any]:
    """Shares of the parts in the time of profiled steps, on the device or else on the host.

    Raises:
        ValueError: there is no step among the events.
    """
    events = list(events)
    intervals = list(find_intervals(events))
    num_steps = sum(interval.name == STEP for interval in intervals)
    if num_steps == 0:
        raise ValueError("events: no step is among them.")
    timeline = Timeline(intervals)
    on_host = timeline.seconds()
    total = sum(on_host.values())
    shares = {name: value / total for name, value in on_host.items()}
    found = {"num_steps": num_steps, "step_ms": total / num_steps * 1e3}
    on_device = device_seconds(events, timeline) if device.type == "cuda" else {}
    busy = sum(on_device.values())
    # Some drivers do not let the profiler see the device.
    if busy == 0:
        return {**found, "time_of": "host", "shares": shares}
    return {
        **found,
        "time_of": "device",
        "shares": {name: value / busy for name, value in on_device.items()},
        "host_shares": shares,
        "device_busy": busy / total,
    }


def table(profile: Mapping[str, Any]) -> str:
    """A text table of the parts of a step, with their shares and milliseconds."""
    step_ms = profile["step_ms"]
    on_device = profile["time_of"] == "device"
    busy_ms = step_ms * profile.get("device_busy", 1.0)
    shares = [(WORDS[name], share) for name, share in profile["shares"].items() if share > 0]
    rows = [
        [name, f"{share:.1%}", f"{share * busy_ms:.2f}"] for name, share in [*shares, ("all", 1.0)]
    ]
    words = f"{profile['num_steps']} steps, {step_ms:.1f} ms each with the profiler on"
    if on_device:
        words += f"; the device is busy {profile['device_busy']:.0%} of it"
    header = ["part of a step", "share", "ms on the device" if on_device else "ms"]
    return f"{words}\n{text_table(header, rows)}"


def check_steps(num_steps: int, left: int, what: str) -> None:
    """Refuse to profile more steps than are left, for the "run" or "stage", after the warm-up.

    Raises:
        ValueError: naming the largest number.
    """
    if num_steps and WARM_UP + num_steps > left:
        most = left - WARM_UP
        remedy = f"Profile at most {most}." if most > 0 else "Profile a longer one."
        raise ValueError(
            f"profile={num_steps}: this {what} has {left} steps to do, the first {WARM_UP} of "
            f"which warm up. {remedy}"
        )


class StepProfiler(contextlib.AbstractContextManager["StepProfiler"]):
    """Profiles `num_steps` steps after `WARM_UP`, then writes profile.json and logs its table.

    Every step of the run is wrapped in `step`, and the run in the profiler itself. Profiling does
    not change what is computed.

    Args:
        num_steps: 0: profile nothing.
        trace: also write all events, in the format of Chrome's tracing.
    """

    def __init__(
        self, num_steps: int, device: torch.device, directory: Path, *, trace: bool = False
    ) -> None:
        self.num_steps = num_steps
        self.device = device
        self.directory = directory
        self.trace = trace
        # The contents of profile.json, once they are known.
        self.profile: dict[str, Any] | None = None
        self._seen = 0
        self._profiler: profile | None = None

    def __exit__(self, *exception: object) -> None:
        # A run that ends early leaves no profile.
        self._stop()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Context of one optimizer step."""
        if self.num_steps == 0 or self.profile is not None:
            yield
            return
        self._seen += 1
        if self._seen == WARM_UP:
            self._start()
        with part(STEP) if self._seen > WARM_UP else contextlib.nullcontext():
            yield
        if self._seen == WARM_UP + self.num_steps:
            self._finish()

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        # Keeps Kineto from logging its start and end.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        self._profiler = profile(activities=activities)
        self._profiler.start()
        mark_parts(True)

    def _stop(self) -> profile | None:
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            mark_parts(False)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            profiler.stop()
        return profiler

    def _finish(self) -> None:
        profiler = self._stop()
        assert profiler is not None
        is_gpu = self.device.type == "cuda"
        self.profile = {
            "schema": SCHEMA,
            "device": torch.cuda.get_device_name(self.device) if is_gpu else self.device.type,
            "warm_up_steps": WARM_UP,
            **summarize(profiler.events(), self.device),
        }
        write_json(self.directory / PROFILE_FILE, self.profile)
        written = str(self.directory / PROFILE_FILE)
        if self.trace:
            # The ending .gz makes torch compress it.
            profiler.export_chrome_trace(str(self.directory / TRACE_FILE))
            written += f" and {TRACE_FILE}"
        logger.info("%s\nwritten: %s", table(self.profile), written)
