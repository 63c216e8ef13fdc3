"""Compiles every kernel as it is shipped for every GPU that is claimed; needs no GPU.

    python -m fusedacl.kernels.targets --help

Reads from each binary what decides whether it runs well: registers, spills, shared memory, matrix
instructions, and the number of warps that a multiprocessor can hold. Ends with status 1 if a
variant does not compile, spills, asks for more shared memory than the GPU has, or lacks the matrix
instructions that it promises.

The Triton is the one that Python finds first; another one is tried with

    PYTHONPATH=<folder that holds it> python -m fusedacl.kernels.targets
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

from ..support.machine import OLDEST_TRITON, dotted, interpreting, triton_version
from ..support.names import check_name
from .chips import CHIPS
from .compilation import list_tasks, measure
from .limits import find_failures, is_unknown
from .tables import markdown, print_table, replace_generated

# The Triton files by the names of their operators; each offers `variants(capability)`.
KERNEL_FILES = {
    "supcon_small": "contrastive.gpu.small_batches",
    "supcon_fused": "contrastive.gpu.large_batches",
    "tile_epilogue": "contrastive.tiled.gpu_epilogue",
    "gradients_fused": "gradients.gpu",
}


def parse_arguments(argv: Sequence[str] | None, files: Iterable[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fusedacl.kernels.targets",
        description="Compile every kernel as it is shipped, for every GPU, without a GPU; status 1 "
        "if one does not compile, spills, exceeds the shared memory, or lacks promised matrix "
        "instructions.",
    )
    parser.add_argument("--kernels", nargs="+", metavar="FILE", help="only these files")
    parser.add_argument(
        "--capability", nargs="+", metavar="NUMBER", help="only these, as 70 for 7.0"
    )
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)),
        help="processes (default: one per usable core, %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--keep-exceptions", action="store_true",
        help="accept a spills_because where nothing spills: for another Triton than the one the "
        "exception was written for",
    )  # fmt: skip
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--quiet", action="store_true", help="print failures and a last line only")
    output.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    output.add_argument(
        "--write", type=Path, metavar="PAGE", help="put the Markdown table between PAGE's markers"
    )
    output.add_argument(
        "--check", type=Path, metavar="PAGE", help="fail if PAGE's table is not the one found"
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
        page = arguments.write or arguments.check
        if page is not None:
            replace_generated(page.read_text(encoding="utf-8"), "")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return arguments


def toolchain_obstacle() -> str | None:
    """What keeps this machine from compiling kernels, or None."""
    if sys.platform != "linux":
        return f"Triton exists for Linux only, and this is {sys.platform}"
    found = triton_version()
    if found is None:
        return "Triton is not installed (pip install triton)"
    if found < OLDEST_TRITON:
        return (
            f"Triton {dotted(found)} is too old: {dotted(OLDEST_TRITON)} or newer is needed "
            "(pip install -U triton)"
        )
    return None


def main(argv: Sequence[str] | None = None, files: Mapping[str, ModuleType] | None = None) -> int:
    """The command; `files` stand in for the shipped ones."""
    arguments = parse_arguments(argv, KERNEL_FILES if files is None else files)
    reason = toolchain_obstacle()
    if reason is not None:
        print(f"cannot compile kernels: {reason}", file=sys.stderr)
        return 2
    if interpreting():
        # Triton has been imported with torch, and gives the kernels to its interpreter.
        environment = {**os.environ, "TRITON_INTERPRET": "0"}
        command = [sys.executable, "-m", "fusedacl.kernels.targets", *(argv or sys.argv[1:])]
        return subprocess.run(command, env=environment, check=False).returncode
    import triton

    if files is None:
        files = {
            name: importlib.import_module(f"..{KERNEL_FILES[name]}", __package__)
            for name in arguments.kernels
        }
    tasks = list_tasks(files, arguments.capability)
    if not tasks:
        print(f"nothing is shipped for these GPUs by {', '.join(files)}", file=sys.stderr)
        return 2
    outcomes = measure(tasks, arguments.jobs)

    heading = f"Triton {triton.__version__}, {len(tasks)} compilations."
    table = markdown(tasks, outcomes, heading)
    failures = [
        f"{task.file}, {task.variant.name}, sm_{task.capability}: {failure}"
        for task, outcome in zip(tasks, outcomes, strict=True)
        for failure in find_failures(task, outcome, keep_exceptions=arguments.keep_exceptions)
    ]
    if arguments.markdown:
        print(table)
    elif arguments.write is not None:
        page = arguments.write.read_text(encoding="utf-8")
        arguments.write.write_text(replace_generated(page, table), encoding="utf-8")
    elif arguments.check is not None:
        page = arguments.check.read_text(encoding="utf-8")
        if replace_generated(page, table) != page:
            failures.append(
                f"the table in {arguments.check} is not this one: run "
                f"python -m fusedacl.kernels.targets --write {arguments.check}"
            )
    elif not arguments.quiet:
        print_table(tasks, outcomes)

    unknown = sorted(
        {
            f"sm_{task.capability}"
            for task, outcome in zip(tasks, outcomes, strict=True)
            if is_unknown(task, outcome)
        }
    )
    if unknown:
        print(f"not compiled, for this assembler does not know it: {', '.join(unknown)}")
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    print(f"{heading[:-1]}: {f'{len(failures)} failures' if failures else 'all as promised'}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
