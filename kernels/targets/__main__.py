"""Compile every shipped kernel for every supported GPU, without a GPU.

    python -m fusedacl.kernels.targets --help

Reads from each binary what decides whether it runs well. Exits with status 1 if one does not
compile, spills registers, exceeds the shared memory, lacks promised matrix instructions, or has
matrix instructions that the assembler makes wait for each other.

Uses the Triton that Python finds first; to use another one:

    PYTHONPATH=<folder that contains it> python -m fusedacl.kernels.targets
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

from ..support.machine import interpreting, version_obstacle
from ..support.names import check_name
from .chips import CHIPS
from .compilation import choose_pairs, list_tasks, measure
from .limits import find_failures, is_unknown, triton_serializes
from .tables import markdown, markdown_cells, print_table, read_cells, replace_generated

# The Triton files by the names of their operators; each has a function `variants(capability)`.
KERNEL_FILES = {
    "supcon_small": "contrastive.gpu.small_batches",
    "supcon_fused": "contrastive.gpu.large_batches",
    "tile_epilogue": "contrastive.tiled.gpu_epilogue",
    "gradients_fused": "gradients.gpu",
}


def _num_cores() -> int:
    """Return the number of usable cores; of all where the system does not tell, as on macOS."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def parse_arguments(argv: Sequence[str] | None, files: Iterable[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fusedacl.kernels.targets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kernels", nargs="+", metavar="FILE", help="compile only these files")
    parser.add_argument(
        "--capability", nargs="+", metavar="NUMBER",
        help="compile only for these compute capabilities; 70 stands for 7.0",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=int, default=_num_cores(),
        help="number of processes (default: one per usable core, %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--pairs", action="store_true",
        help="compile a selection in which every two properties of a variant (kernel, constants, "
        "types, GPU) occur together: about a fifth of all compilations",
    )  # fmt: skip
    parser.add_argument(
        "--keep-exceptions", action="store_true",
        help="accept a spills_because where nothing spills, for a Triton other than the one that "
        "the exception was written for",
    )  # fmt: skip
    output = parser.add_mutually_exclusive_group()
    quiet = "print only failures and a summary line"
    output.add_argument("--quiet", action="store_true", help=quiet)
    output.add_argument(
        "--write", type=Path, metavar="PAGE",
        help="write the results as Markdown tables between PAGE's markers",
    )  # fmt: skip
    output.add_argument(
        "--check", type=Path, metavar="PAGE", help="fail if PAGE's tables differ from the results"
    )
    arguments = parser.parse_args(argv)
    try:
        arguments.kernels = arguments.kernels or list(files)
        for name in arguments.kernels:
            check_name("--kernels", name, list(files))
        known = [str(capability) for capability in CHIPS]
        for number in arguments.capability or []:
            check_name("--capability", number, known)
        arguments.capability = [int(number) for number in arguments.capability or known]
        if arguments.jobs < 1:
            raise ValueError(f"--jobs is {arguments.jobs}: it must be at least 1")
        if arguments.pairs and arguments.write:
            raise ValueError("--write needs every compilation: leave out --pairs")
        page = arguments.write or arguments.check
        if page is not None:
            replace_generated(page.read_text(encoding="utf-8"), "")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return arguments


def main(argv: Sequence[str] | None = None, files: Mapping[str, ModuleType] | None = None) -> int:
    """Run the command; `files` replace the shipped ones in tests."""
    arguments = parse_arguments(argv, KERNEL_FILES if files is None else files)
    reason = version_obstacle()
    if sys.platform != "linux":
        reason = f"Triton exists for Linux only, and this is {sys.platform}"
    if reason is not None:
        print(f"cannot compile kernels: {reason}", file=sys.stderr)
        return 2
    if interpreting():
        # Kernels that are already imported belong to the interpreter: start a new process.
        environment = {**os.environ, "TRITON_INTERPRET": "0"}
        command = [sys.executable, "-m", "fusedacl.kernels.targets", *(argv or sys.argv[1:])]
        return subprocess.run(command, env=environment, check=False).returncode
    import triton

    if files is None:
        files = {
            name: importlib.import_module(f"..{KERNEL_FILES[name]}", __package__)
            for name in arguments.kernels
        }
    everything = list_tasks(files, arguments.capability)
    tasks = choose_pairs(everything) if arguments.pairs else everything
    if not tasks:
        print(f"nothing is shipped for these GPUs by {', '.join(files)}", file=sys.stderr)
        return 2
    outcomes = measure(tasks, arguments.jobs)

    heading = f"Triton {triton.__version__}, {len(tasks)} compilations."
    failures, unknown, serialized = [], set(), 0
    for task, outcome in zip(tasks, outcomes, strict=True):
        place = f"{task.file}, {task.variant.name}, sm_{task.capability}"
        found = find_failures(task, outcome, keep_exceptions=arguments.keep_exceptions)
        failures += [f"{place}: {failure}" for failure in found]
        serialized += not isinstance(outcome, str) and bool(outcome.serialized)
        if is_unknown(task, outcome):
            unknown.add(f"sm_{task.capability}")
    if arguments.write is not None:
        page = arguments.write.read_text(encoding="utf-8")
        table = markdown(tasks, outcomes, heading)
        arguments.write.write_text(replace_generated(page, table), encoding="utf-8")
    elif arguments.check is not None:
        written = read_cells(arguments.check.read_text(encoding="utf-8"))
        cells = markdown_cells(tasks, outcomes)
        differing = {key for key in cells if written.get(key) != cells[key]}
        # Cells without a variant, and variants without a cell, also where nothing was compiled.
        known = {(task.file, task.variant.name, task.capability) for task in everything}
        chosen = {key for key in written if key[0] in files and key[2] in arguments.capability}
        differing |= known ^ chosen
        if differing:
            first = ", ".join(map(str, min(differing)))
            failures.append(
                f"{len(differing)} cells of {arguments.check} differ, such as {first}: run "
                f"python -m fusedacl.kernels.targets --write {arguments.check}"
            )
    elif not arguments.quiet:
        print_table(tasks, outcomes)

    if unknown:
        names = ", ".join(sorted(unknown))
        print(f"not compiled, because this assembler does not know it: {names}")
    if serialized and triton_serializes():
        words = "variants wait for their own matrix products, as this Triton compiles them"
        print(f"{serialized} {words}")
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    print(f"{heading[:-1]}: {f'{len(failures)} failures' if failures else 'all as promised'}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
