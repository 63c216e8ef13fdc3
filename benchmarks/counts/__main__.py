"""Counts of losses, training steps and inference, which are the same on any machine.

    python -m fusedacl.benchmarks.counts                        print them, and changes
    python -m fusedacl.benchmarks.counts --write                accept them
    python -m fusedacl.benchmarks.counts --only 'step: acl' --places

The counts are of PyTorch operations, FLOP of matrix products, bytes, host reads, passes through the
model, Triton launches and collectives, on the CPU with one thread. Exit status 1 means that they
differ from expected.json, which names the versions with which it was accepted.
"""

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from ...engine.runtime.files import write_json
from ...engine.runtime.text import text_table
from ..measuring.counting import Counts, count
from .kernel_cases import Case, kernel_cases
from .step_cases import model_cases

EXPECTED = Path(__file__).with_name("expected.json")
ACCEPT = "python -m fusedacl.benchmarks.counts --write"
# Relative tolerances. Bytes depend on when Python frees a tensor; another minor version of the
# packages may run other operations for the same call.
TOLERANCES = {"allocated_bytes": 0.01, "peak_bytes": 0.01}
TOLERANCES_ELSEWHERE = {"allocated_bytes": 0.1, "peak_bytes": 0.1, "operations": 0.1}
PACKAGES = ("torch", "transformers")
# The first call of a case creates what later calls reuse: optimizer state, tables, caches.
CALLS = 2

Record = dict[str, Any]


def cases() -> list[Case]:
    return [*kernel_cases(), *model_cases()]


def measure(case: Case, directory: Path, calls: int = CALLS) -> tuple[Counts, Counter[str]]:
    """Counts of a case's last call, and its operations by function.

    With three calls or more, the last two must have the same counts (RuntimeError).
    """
    with ExitStack() as stack:
        # The number of threads changes how work is split.
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        subject = case.prepare(directory)
        found = [count(subject.call, subject.watched) for _ in range(calls)]
    if calls > 2 and found[-2] != found[-1]:
        changes = compare_case(case.name, found[-2][0].record(), found[-1][0].record(), exact=True)
        raise RuntimeError(f"a call does not repeat: {'; '.join(changes)}")
    return found[-1]


def versions() -> dict[str, str]:
    """Package -> major and minor version, on which counts depend."""
    return {name: ".".join(version(name).split(".")[:2]) for name in PACKAGES}


def read_expected() -> Record:
    """Read expected.json: {"versions": …, "cases": {name: record}}; ValueError without it."""
    if not EXPECTED.is_file():
        raise ValueError(f"{EXPECTED}: no such file; in a checkout {ACCEPT} writes it.")
    found: Record = json.loads(EXPECTED.read_text(encoding="utf-8"))
    return found


def compare(expected: Record, found: Mapping[str, Record]) -> list[str]:
    """Changes in the cases found, one line each."""
    exact = expected["versions"] == versions()
    known = expected["cases"]
    lines = [f"{name}: a new case" for name in found if name not in known]
    for name in (name for name in found if name in known):
        lines += compare_case(name, known[name], found[name], exact=exact)
    return lines


def compare_case(name: str, expected: Record, found: Record, *, exact: bool) -> list[str]:
    """Changes in one case; `exact`: the versions are those of `expected`."""
    lines = []
    for what in Counts.__dataclass_fields__:
        before, after = expected[what], found[what]
        tolerance = (TOLERANCES if exact else TOLERANCES_ELSEWHERE).get(what)
        change = abs(_total(after) - _total(before))
        if before == after or (tolerance and change <= tolerance * _total(before)):
            continue
        line = f"{name}: {what}: expected {_total(before):,}, found {_total(after):,}"
        if isinstance(before, dict):
            changes = [
                f"{key} {before.get(key, 0)} -> {after.get(key, 0)}"
                for key in sorted({*before, *after})
                if before.get(key, 0) != after.get(key, 0)
            ]
            line += f" ({', '.join(changes)})"
        lines.append(line)
    return lines


def _total(value: int | dict[str, int]) -> int:
    return sum(value.values()) if isinstance(value, dict) else value


def explain(lines: Sequence[str]) -> str:
    """The lines of `compare`, and how to accept the changes."""
    return "\n".join([*lines, f"If these changes are intended, accept them: {ACCEPT}"])


def table(found: Mapping[str, Record]) -> str:
    columns: dict[str, Callable[[Record], str]] = {
        "operations": lambda record: str(_total(record["operations"])),
        "MFLOP": lambda record: f"{record['flops'] / 1e6:.1f}",
        "KiB": lambda record: f"{record['allocated_bytes'] / 1024:.0f}",
        "peak KiB": lambda record: f"{record['peak_bytes'] / 1024:.0f}",
        "host reads": lambda record: str(_total(record["host_reads"])),
        "backbone": lambda record: str(record["passes"].get("backbone", 0)),
        "launches": lambda record: str(_total(record["launches"])),
        "binaries": lambda record: str(record["binaries"]),
        "collectives": lambda record: str(_total(record["collectives"])),
    }
    rows = [[name, *(cell(record) for cell in columns.values())] for name, record in found.items()]
    return text_table(["case", *columns], rows)


def write(found: Mapping[str, Record], kept: Sequence[str]) -> None:
    """Write expected.json; the cases `kept` stay, so their versions must be these (ValueError)."""
    before = read_expected() if EXPECTED.is_file() else {"versions": versions(), "cases": {}}
    if kept and before["versions"] != versions():
        raise ValueError(
            f"{EXPECTED.name} has counts of {before['versions']}, but these are of {versions()}: "
            "accept all cases together."
        )
    known = {name: before["cases"][name] for name in kept if name in before["cases"]} | dict(found)
    in_order = {case.name: known[case.name] for case in cases() if case.name in known}
    write_json(EXPECTED, {"versions": versions(), "cases": in_order})
    print(f"written: {EXPECTED}")


def print_places(places: Counter[str]) -> None:
    """Print the number and names of the operations of each function."""
    by_function: dict[str, list[str]] = {}
    totals: Counter[str] = Counter()
    for place, number in places.most_common():
        function, _, name = place.rpartition(": ")
        totals[function] += number
        by_function.setdefault(function, []).append(f"{name} {number}")
    for function, number in totals.most_common():
        print(f"{number:6d}  {function}: {', '.join(by_function[function])}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--write", action="store_true", help="accept these counts: write them to expected.json"
    )
    parser.add_argument("--only", metavar="TEXT", help="only cases whose names begin with TEXT")
    parser.add_argument("--places", action="store_true", help="print where operations come from")
    options = parser.parse_args(arguments)
    chosen = [case for case in cases() if case.name.startswith(options.only or "")]
    if not chosen:
        names = ", ".join(case.name for case in cases())
        parser.error(f"--only {options.only}: no case begins with it; there are: {names}")
    # Triton reads this when the kernels are imported.
    os.environ["TRITON_INTERPRET"] = "1"
    transformers.utils.logging.disable_progress_bar()
    found: dict[str, Record] = {}
    places: dict[str, Counter[str]] = {}
    left_out = {case.name: reason for case in chosen if (reason := case.obstacle()) is not None}
    calls = CALLS + 1 if options.write else CALLS
    with tempfile.TemporaryDirectory() as directory:
        for case in tqdm(chosen, leave=False, disable=None):
            if case.name not in left_out:
                counts, places[case.name] = measure(case, Path(directory), calls)
                found[case.name] = counts.record()
    print(table(found))
    for name, reason in left_out.items():
        print(f"not counted: {name}: {reason}")
    for name in found if options.places else ():
        print(f"\n{name}")
        print_places(places[name])
    if options.write:
        write(found, [case.name for case in cases() if case.name not in found])
        return 0
    changes = compare(read_expected(), found)
    if changes:
        print(explain(changes), file=sys.stderr)
    return 1 if changes else 0


if __name__ == "__main__":
    sys.exit(main())
