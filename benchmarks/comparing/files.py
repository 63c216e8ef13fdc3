"""Comparison of two results: faster, slower, or no change beyond the noise.

A change is reported only if all of these hold: the medians differ by more than the spread of either
run; the intervals from the 20th to the 80th percentile do not overlap; the machine's own rates and
the case's other providers, which are not our code, changed by less; neither run is noisy.
"""

import math
import statistics
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ...engine.runtime.text import text_table
from ..measuring.environment import Result
from ..measuring.result_file import spread, timings

FASTER, SLOWER, SAME = "faster", "slower", "no change seen"
NOT_JUDGED = "not judged: noisy"
VERDICTS = (FASTER, SLOWER, SAME, NOT_JUDGED)
Times = dict[tuple[str, ...], Result]
# Two runs of the same code on the same machine differ by this much.
MIN_CHANGE = 0.03
RATES = ("giga_exponentials_per_second", "gigabytes_per_second")
ENVIRONMENT = ("cpu", "gpu", "cores", "threads", "torch", "python", "driver", "cuda", "triton")


def compare(old: Result, new: Result, names: tuple[str, str] = ("old", "new")) -> str:
    """Table of changes, and differences of machine; ValueError if no case is common."""
    if old["benchmark"] != new["benchmark"]:
        raise ValueError(
            f"{names[0]} is a result of bench {old['benchmark']}, {names[1]} of bench "
            f"{new['benchmark']}: name two files of one suite."
        )
    drift = machine_drift(old, new)
    lines = [f"old: {_origin(old)}", f"new: {_origin(new)}", *_differences(old, new)]
    lines.append(
        "noise: times scatter by "
        f"{old['noise']['spread']:.1%} (old) and {new['noise']['spread']:.1%} (new), "
        f"typically; the machine's own rates differ by {drift:.1%} at most."
    )
    for name, result in zip(("old", "new"), (old, new), strict=True):
        if result["noise"]["noisy"]:
            lines.append(f"{name} is noisy: {'; '.join(result['noise']['why'])}.")
    rows = changes(old, new, drift)
    if not rows:
        raise ValueError(f"{names[0]} and {names[1]} have no case in common: nothing to compare.")
    header = ["case", "old ms", "new ms", "new / old", "noise", "verdict"]
    cell = "{words}|{old_ms:.4g}|{new_ms:.4g}|{ratio:.3f}|{noise:.1%}|{verdict}"
    found = Counter(row["verdict"] for row in rows)
    lines += ["", text_table(header, [cell.format(**row).split("|") for row in rows]), ""]
    lines.append(", ".join(f"{found[word]} {word}" for word in VERDICTS))
    return "\n".join(lines)


def changes(old: Result, new: Result, drift: float = 0.0) -> list[Result]:
    """Ratio of medians and verdict for every time that both results have."""
    before, after = _times(old), _times(new)
    noisy = old["noise"]["noisy"] or new["noise"]["noisy"]
    rows = []
    for path, times in before.items():
        if path not in after:
            continue
        control = max(drift, _control(before, after, path))
        row = judge(times, after[path], control)
        if noisy and row["verdict"] != SAME:
            row["verdict"] = NOT_JUDGED
        rows.append({"words": ": ".join(path)} | row)
    return rows


def _control(before: Times, after: Times, path: tuple[str, ...]) -> float:
    """Median change of the case's other providers, which are not our code, between the runs."""
    moved = [
        abs(math.log(after[other]["p50_ms"] / times["p50_ms"]))
        for other, times in before.items()
        if other[:-1] == path[:-1] and other != path and times.get("ours") is False
        and other in after
    ]  # fmt: skip
    return math.exp(statistics.median(moved)) - 1 if moved else 0.0


def judge(old: Mapping[str, Any], new: Mapping[str, Any], drift: float = 0.0) -> Result:
    """Ratio, noise and verdict for one pair of times."""
    change = new["p50_ms"] / old["p50_ms"]
    noise = max(spread(dict(old)), spread(dict(new)), drift, MIN_CHANGE)
    verdict = SAME
    if change < 1 / (1 + noise) and new["p80_ms"] < old["p20_ms"]:
        verdict = FASTER
    elif change > 1 + noise and new["p20_ms"] > old["p80_ms"]:
        verdict = SLOWER
    return {
        "old_ms": old["p50_ms"], "new_ms": new["p50_ms"], "ratio": change, "noise": noise,
        "verdict": verdict,
    }  # fmt: skip


def machine_drift(old: Result, new: Result) -> float:
    """Largest relative difference of the rates that both runs measured; 0 if there are none."""
    before, after = _rates(old), _rates(new)
    changes = (abs(after[key] / before[key] - 1) for key in before if key in after)
    return max(changes, default=0.0)


def _rates(result: Result) -> dict[str, float]:
    """Known rates of a result: of matrix products by dtype, and RATES."""
    rates = result.get("rates") or {}
    found = rates.get("gigaflops", {}) | {key: rates.get(key) for key in RATES}
    return {key: rate for key, rate in found.items() if rate}


def merged(runs: list[Result]) -> Result:
    """Merge several runs of one commit: the median of their medians, and the widest interval.

    The interval also covers the medians of all runs.
    """
    first, found = runs[0], [_times(run) for run in runs]
    times = {}
    for path in found[0]:
        of_path = [each[path] for each in found if path in each]
        medians = [each["p50_ms"] for each in of_path]
        times["\n".join(path)] = {
            "p20_ms": min(min(each["p20_ms"] for each in of_path), *medians),
            "p50_ms": statistics.median(medians),
            "p80_ms": max(max(each["p80_ms"] for each in of_path), *medians),
            "samples": sum(each["samples"] for each in of_path),
            "ours": of_path[0].get("ours"),
        }
    typical = statistics.median([spread(each) for each in times.values()]) if times else 0.0
    why = list(dict.fromkeys(words for run in runs for words in run["noise"]["why"]))
    noise = first["noise"] | {"spread": typical, "noisy": bool(why), "why": why}
    return {key: first[key] for key in ("schema", "benchmark", "preset", "environment")} | {
        "rates": _best_rates(runs), "noise": noise, "merged": times,
    }  # fmt: skip


def _best_rates(runs: list[Result]) -> Result:
    """The highest value of each rate in any run."""
    best: dict[str, float] = {}
    for key, rate in (item for run in runs for item in _rates(run).items()):
        best[key] = max(rate, best.get(key, 0.0))
    others = {key: best.pop(key) for key in RATES if key in best}
    return {"gigaflops": best, **others}


def _times(result: Result) -> Times:
    """Every time by its path; merged results have paths as keys already."""
    if "merged" in result:
        return {tuple(key.split("\n")): value for key, value in result["merged"].items()}
    others = ("environment", "rates", "noise", "growth")
    return dict(timings({key: value for key, value in result.items() if key not in others}))


def _origin(result: Result) -> str:
    environment = result["environment"]
    return f"commit {environment['commit']}, {environment['date']}, preset {result['preset']}"


def _differences(old: Result, new: Result) -> list[str]:
    """Sentences about differences of machine, versions and settings."""
    before, after = old["environment"], new["environment"]
    found = [
        f"{key} differs: {before.get(key)} and {after.get(key)}."
        for key in ENVIRONMENT
        if before.get(key) != after.get(key)
    ]
    if any(before.get(key) != after.get(key) for key in ("cpu", "gpu", "cores", "threads")):
        found.append("These are different machines or settings: ratios are not the code's alone.")
    return found
