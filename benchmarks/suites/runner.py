"""Run the cases of a suite: check memory and results, then time in turns and measure peaks."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle
from typing import Any

import torch

from ...engine.runtime.text import text_table
from ..floors.rates import Rates
from ..measuring import memory
from ..measuring.busy_core import times_beside_a_busy_core
from ..measuring.clock import interleave_on, launches, synchronize
from ..measuring.environment import Result
from ..measuring.memory import extra_device_memory
from ..measuring.result_file import ResultFile
from ..measuring.times_table import times_table
from .suite import Call, Provider, Suite, peak_bytes

# Size of a case's input sets together, in caches: no call finds its inputs in the cache.
CACHES = 1.25
# Upper limit of input sets, for tiny cases whose sets are mostly Python objects.
MAX_SETS = 8192
# Length of a sample; fast calls are repeated to fill it.
SAMPLE_SECONDS = 0.02


class DeviceLost(Exception):
    """The device no longer answers. The finished cases are in the file."""


@dataclass(frozen=True)
class Settings:
    """Settings of a run.

    rounds: upper limit; slow cases get fewer (at least 3), so that they take `case_seconds`.
    providers: names of those to run, empty for all.
    skipped: providers that the preset leaves out, with the reason.
    child: measures peak memory on a CPU; None skips that measurement.
    busy_core: on a CPU, time the suite's `shared` cases also beside a process that keeps a core
        busy.
    """

    device: torch.device
    rounds: int
    case_seconds: float
    providers: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    child: memory.Child | None = None
    busy_core: bool = False


def rotating(call: Call, inputs: Sequence[Any]) -> Callable[[], Any]:
    """A call that uses the next input set each time."""
    turn = cycle(inputs)
    return lambda: call(next(turn))


def num_input_sets(suite: Suite, case: Any, device: torch.device) -> int:
    """Number of input sets that exceeds the cache together, at most MAX_SETS."""
    size = suite.input_bytes(case)
    return max(1, min(MAX_SETS, math.ceil(CACHES * memory.cache_bytes(device) / size)))


def plan(
    suite: Suite, case: Any, settings: Settings
) -> tuple[list[Provider], dict[str, str], bool]:
    """Providers that can run, the reasons of the others, and whether no provider fits memory."""
    device = settings.device
    available = memory.available_bytes(device)
    size = num_input_sets(suite, case, device) * suite.input_bytes(case) + suite.check_bytes(case)
    fitting, left_out, refused = [], {}, 0
    for provider in suite.providers(case, device):
        if settings.providers and provider.name not in settings.providers:
            continue
        skipped = None if settings.providers else settings.skipped.get(provider.name)
        reason = skipped or provider.obstacle(case, device)
        if reason is None:
            reason = memory.too_large(size + provider.extra_bytes(case), available)
            refused += reason is not None
        if reason is None:
            fitting.append(provider)
        else:
            left_out[provider.name] = reason
    return fitting, left_out, refused > 0 and not fitting


def refuse_what_cannot_fit(suite: Suite, cases: Sequence[Any], settings: Settings) -> None:
    """ValueError if nothing of a run fits into memory, with the numbers and a size that fits."""
    plans = [plan(suite, case, settings) for case in cases]
    if not cases or not all(out_of_memory for _, _, out_of_memory in plans):
        return
    left_out = plans[0][1].items()
    name, reason = next(each for each in left_out if each[1].startswith("does not fit"))
    smaller = suite.shrunk(cases[0])
    while smaller is not None and plan(suite, smaller, settings)[2]:
        smaller = suite.shrunk(smaller)
    fits = "no size" if smaller is None else suite.words(smaller)
    raise ValueError(f"{suite.words(cases[0])}: {name} {reason}. This would fit: {fits}.")


def run_cases(
    suite: Suite,
    cases: Sequence[Any],
    settings: Settings,
    file: ResultFile,
    rates: Rates | None,
    labels: Sequence[Mapping[str, Any]] = (),
) -> list[str]:
    """Append every case to the file, which is saved after each; return failures of ours.

    labels: further entries for each case.
    """
    failures: list[str] = []
    said: set[tuple[str, str]] = set()
    for index, case in enumerate(cases):
        try:
            found, failed = run_case(suite, case, settings, rates)
        except DeviceLost as error:
            file.result["stopped"] = str(error)
            file.save()
            return [*failures, f"{error}; {index} of {len(cases)} cases are kept in {file.path}"]
        if labels:
            found |= labels[index]
        file.result.setdefault("cases", []).append(found)
        file.save()
        print_case(found, said)
        failures += failed
    return failures


def run_case(
    suite: Suite, case: Any, settings: Settings, rates: Rates | None
) -> tuple[Result, list[str]]:
    """One case of the result file, and the failures of our providers."""
    fitting, left_out, _ = plan(suite, case, settings)
    found: Result = {
        "case": asdict(case), "words": suite.words(case), "floor_ms": None, "bound_by": None,
        "providers": {}, "left_out": left_out,
    }  # fmt: skip
    if not fitting:
        return found, []
    device = settings.device
    number = num_input_sets(suite, case, device)
    inputs = suite.inputs(case, device, number)
    found["input_sets"] = {"number": number, "bytes": number * suite.input_bytes(case)}
    calls, errors, failures = _checked(suite, case, fitting, inputs, left_out, device)
    of_rates = suite.rate_calls(case) if device.type == "cpu" else {}
    rotations = {name: rotating(call, inputs) for name, call in calls.items()}
    try:
        times = interleave_on(
            device, rotations | of_rates, rounds=settings.rounds, sample_seconds=SAMPLE_SECONDS,
            all_seconds=settings.case_seconds,
        )  # fmt: skip
        busy = {}
        if settings.busy_core and device.type == "cpu" and suite.shared(case):
            busy = times_beside_a_busy_core(
                rotations, times, rounds=settings.rounds, all_seconds=settings.case_seconds
            )
        launched = {name: launches(turn, device) for name, turn in rotations.items()}
        peaks: dict[str, Any] = {
            name: extra_device_memory(turn, device) for name, turn in rotations.items()
        }
    except RuntimeError as error:
        refuse_lost(device, error)
        raise
    if of_rates:
        rates = suite.rates(case, times)
        found["rates"] = rates.record()
    if settings.child is not None and device.type == "cpu":
        # The child makes its own inputs and needs the memory of these.
        del inputs, rotations
        peaks = {name: settings.child.measure(peak_bytes, suite, name, case) for name in calls}
    floor = None if rates is None else suite.floor(rates, case)
    if floor is not None:
        found |= {"floor_ms": floor.seconds * 1e3, "bound_by": floor.bound_by}
    for provider in (each for each in fitting if each.name in calls):
        name, peak, kernels = provider.name, peaks[provider.name], launched[provider.name]
        entry = times[name] | {
            "error": errors[name], "formula": provider.formula, "ours": provider.is_ours,
            "peak_bytes": peak if isinstance(peak, int) else None,
            "over_floor": None if floor is None else times[name]["p50_ms"] / found["floor_ms"],
        }  # fmt: skip
        if isinstance(peak, str):
            entry["peak_unknown"] = peak
        if busy:
            entry["busy_core"] = busy[name]
        if kernels is not None:
            entry |= {"launches": len(kernels)} | ({"launched": kernels} if entry["ours"] else {})
        found["providers"][name] = entry
    return found, failures


def _checked(
    suite: Suite,
    case: Any,
    fitting: Sequence[Provider],
    inputs: Sequence[Any],
    left_out: dict[str, str],
    device: torch.device,
) -> tuple[dict[str, Call], dict[str, float], list[str]]:
    """Calls with correct results, their errors, and failures of ours.

    Every other provider is added to `left_out` with the reason.
    """
    calls, errors, failures = {}, {}, []
    exact = {
        formula: suite.exact(formula, case, inputs[0])
        for formula in {provider.formula for provider in fitting}
    }
    for provider in fitting:
        reason = None
        try:
            call = provider.make(case, device)
            error = suite.error(call, case, inputs[0], exact[provider.formula])
        except torch.cuda.OutOfMemoryError:
            reason = "does not fit: out of memory"
            torch.cuda.empty_cache()
        except Exception as failure:
            # Other people's compilers and kernels raise errors of any type.
            refuse_lost(device, failure)
            reason = f"failed: {type(failure).__name__}: {str(failure).partition(chr(10))[0]}"
        else:
            limit = suite.max_error(provider, case)
            if not error <= limit:
                reason = f"wrong by {error:.1e} of the largest value, {limit:.0e} is the limit"
        if reason is None:
            calls[provider.name], errors[provider.name] = call, error
            continue
        left_out[provider.name] = f"{reason}: not timed"
        if provider.is_ours:
            failures.append(f"{suite.words(case)}: {provider.name} {reason}")
    return calls, errors, failures


def refuse_lost(device: torch.device, error: Exception) -> None:
    """DeviceLost if the device no longer answers after a failed call."""
    try:
        synchronize(device)
    except RuntimeError:
        words = str(error).partition("\n")[0]
        raise DeviceLost(f"the device {device} does not answer any more: {words}") from error


def print_case(found: Result, said: set[tuple[str, str]]) -> None:
    """Print a case as a table. Reasons in `said` are not printed again."""
    floor = found["floor_ms"]
    print(f"\n{found['words']}", end="")
    print("" if floor is None else f"   floor {floor:.3g} ms ({found['bound_by']})")
    if found["providers"]:
        print(times_table(found["providers"], text_table))
    for name, reason in (each for each in found["left_out"].items() if each not in said):
        print(f"  {name}: {reason}")
    said.update(found["left_out"].items())
    sys.stdout.flush()
