"""Compilation of kernel variants for GPUs that are not present, and their use of resources."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from ..support.variant import Variant
from .chips import CHIPS, THREADS_PER_WARP


@dataclass(frozen=True)
class Task:
    """One variant to compile for one compute capability."""

    file: str
    capability: int
    variant: Variant


@dataclass(frozen=True)
class Resources:
    """Resources of one compiled variant.

    registers: per thread.
    spilled: bytes per thread in local memory.
    shared: bytes of shared memory per block.
    matrix: number of matrix instructions in the code (mma, wgmma, tcgen05).
    loads, wide_loads: load instructions from global memory, and those of 16 bytes or more.
    serialized: the assembler's reason for wgmma instructions that wait for each other, or "".
    """

    registers: int
    spilled: int
    shared: int
    matrix: int
    loads: int
    wide_loads: int
    serialized: str = ""


# The result of a task: its resources, or why it does not compile.
Outcome = Resources | str


def compile_variant(task: Task) -> tuple[bytes, str, int]:
    """Return the binary, the PTX, and the dynamic shared memory in bytes; Triton keeps them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    variant = task.variant
    kernel = variant.kernel
    if not isinstance(kernel, triton.JITFunction):
        raise TypeError(
            f"the kernel is a {type(kernel).__name__}, not a function under @triton.jit: give that "
            "one in the variant, and import the kernels without TRITON_INTERPRET"
        )
    wrong = {*variant.types, *variant.constants} ^ {*kernel.arg_names}
    if wrong:
        raise TypeError(
            f"{', '.join(sorted(wrong))}: the names in types and constants must be the kernel's "
            "arguments"
        )
    wrong = {*variant.divisible_by_16} - {*variant.types}
    if wrong:
        names = ", ".join(sorted(wrong))
        raise TypeError(f"{names}: divisible_by_16 holds what types does not name")
    source = ASTSource(
        fn=kernel,
        signature={name: variant.types.get(name, "constexpr") for name in kernel.arg_names},
        constexprs=dict(variant.constants),
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(kernel.arg_names)
            if name in variant.divisible_by_16
        },
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", task.capability, THREADS_PER_WARP),
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
    )
    return compiled.asm["cubin"], compiled.asm["ptx"], compiled.metadata.shared


def read_resources(binary: bytes, ptx: str, dynamic_shared: int, capability: int) -> Resources:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        # From Triton's own package, so that its version matches the assembler's.
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        listing = run_tool(tool, "--dump-resource-usage", file.name)
    usage = parse_usage(listing)
    static_shared = usage["SHARED"]
    if capability >= 90 and static_shared > 0:
        # There the assembler includes what the system reserves in a block with shared memory.
        static_shared -= CHIPS[capability].shared_reserved
    spilled, shared = usage["STACK"] + usage["LOCAL"], static_shared + dynamic_shared
    matrix = count_matrix_instructions(ptx)
    return Resources(
        usage["REG"], spilled, shared, matrix, *count_loads(ptx), find_serialization(ptx)
    )


def run_tool(tool: str | Path, *arguments: str) -> str:
    """Return what a tool prints on both streams."""
    done = subprocess.run([tool, *arguments], check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def find_serialization(ptx: str) -> str:
    """Return why the assembler makes wgmma instructions wait for each other, or "".

    It says so in a message (C7510, C7515, ...) and goes on; Triton drops what it prints, and keeps
    binaries, so it is called once more.
    """
    target = re.search(r"^\s*\.target\s+(sm_(\d+)\w*)", ptx, re.MULTILINE)
    if target is None or "wgmma.mma_async" not in ptx:
        return ""
    from triton.backends.nvidia.compiler import get_ptxas

    found = get_ptxas(int(target[2]))
    # A path and a version until 3.3.
    assembler = found[0] if isinstance(found, tuple) else found.path
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx, encoding="utf-8")
        printed = run_tool(
            assembler, f"--gpu-name={target[1]}", str(source), "--output-file", f"{source}.cubin"
        )
    said = re.search(r"wgmma\.mma_async instructions are serialized(?: due to)? ?(.*)", printed)
    return "" if said is None else said[1].strip() or "it gives no reason"


def parse_usage(listing: str) -> dict[str, int]:
    """Return REG, STACK, SHARED, LOCAL of a kernel as `cuobjdump --dump-resource-usage` lists."""
    fields = {name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", listing)}
    missing = {"REG", "STACK", "SHARED", "LOCAL"} - set(fields)
    if missing:
        raise ValueError(f"cuobjdump lists no {', '.join(sorted(missing))}: {listing!r}")
    return fields


def count_matrix_instructions(ptx: str) -> int:
    return len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx))


def count_loads(ptx: str) -> tuple[int, int]:
    """Return the number of loads from global memory, and of those of 16 bytes or more."""
    widths = []
    for instruction in re.findall(r"\bld\.global[\w.:]*", ptx):
        # ld.global.L1::evict_last.v4.b32: four registers of 32 bits.
        vector = re.search(r"\.v(\d)\.", instruction)
        bits = int(re.sub(r".*\D", "", instruction))
        widths.append((int(vector[1]) if vector else 1) * bits // 8)
    # cp.async.cg.shared.global [to], [from], bytes
    copies = re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;,]*,[^;,]*, *(\w+)", ptx)
    widths += [int(copy, 0) for copy in copies]
    return len(widths), sum(width >= 16 for width in widths)


def list_tasks(files: Mapping[str, ModuleType], capabilities: Sequence[int]) -> list[Task]:
    tasks = [
        Task(name, capability, variant)
        for name, module in files.items()
        for capability in capabilities
        for variant in module.variants(capability)
    ]
    for name, module in files.items():
        if not any(module.variants(capability) for capability in CHIPS):
            raise ValueError(f"{name}.variants ships nothing for any GPU")
    numbers = Counter((task.file, task.capability, task.variant.name) for task in tasks)
    for (file, capability, name), number in numbers.items():
        if number > 1:
            raise ValueError(
                f"{file}.variants({capability}) names two variants {name!r}: say in the names what "
                "distinguishes them"
            )
    return tasks


def choose_pairs(tasks: Sequence[Task]) -> list[Task]:
    """Choose tasks, greedily, in which any two properties that meet in a task of a file meet too.

    Properties are the kernel, each constant, type and alignment, and the GPU.
    """
    pairs_of = []
    for task in tasks:
        variant = task.variant
        properties = [
            ("kernel", getattr(variant.kernel, "__name__", None)), ("capability", task.capability),
            ("divisible", variant.divisible_by_16),
            *variant.constants.items(), *variant.types.items(),
        ]  # fmt: skip
        pairs = itertools.combinations(sorted(map(str, properties)), 2)
        pairs_of.append({(task.file, *pair) for pair in pairs})
    return [tasks[index] for index in cover(pairs_of)]


def cover(sets: Sequence[set[Any]]) -> list[int]:
    """Choose sets, greedily, whose union is that of all sets; return their positions."""
    missing, chosen = set().union(*sets), []
    while missing:
        best = max(range(len(sets)), key=lambda index: len(sets[index] & missing))
        missing -= sets[best]
        chosen.append(best)
    return chosen


@dataclass
class Worker:
    """A process that compiles a share of the tasks; `share` holds the tasks not yet reported."""

    process: BaseProcess
    share: deque[int]
    log: Path


def measure(tasks: Sequence[Task], num_jobs: int) -> list[Outcome]:
    """Return the outcome of each task, computed by `num_jobs` processes.

    Some kernels make the compiler abort its process, so it runs in processes of its own.
    """
    outcomes: dict[int, Outcome] = {}
    shares = [deque(range(first, len(tasks), num_jobs)) for first in range(num_jobs)]
    with tempfile.TemporaryDirectory(prefix="fusedacl-targets-") as folder:
        workers = dict(
            start_worker(tasks, share, Path(folder, f"{number}.log"))
            for number, share in enumerate(shares)
            if share
        )
        while workers:
            for receiver in cast(list[Connection], wait(list(workers))):
                worker = workers[receiver]
                try:
                    outcome = receiver.recv()
                except EOFError:
                    del workers[receiver]
                    worker.process.join()
                    if not worker.share:
                        continue
                    code = worker.process.exitcode or 0
                    how = signal.Signals(-code).name if code < 0 else f"status {code}"
                    outcome = summarize(f"{how} ended the compiler's process", worker.log)
                    if len(worker.share) > 1:
                        rest = deque(list(worker.share)[1:])
                        workers |= [start_worker(tasks, rest, worker.log)]
                outcomes[worker.share.popleft()] = outcome
                if sys.stderr.isatty():
                    end = "\n" if len(outcomes) == len(tasks) else ""
                    print(f"\rcompiled {len(outcomes)} of {len(tasks)}", end=end, file=sys.stderr)
    return [outcomes[index] for index in range(len(tasks))]


def start_worker(tasks: Sequence[Task], share: deque[int], log: Path) -> tuple[Connection, Worker]:
    # A forked process has the kernels. This one has compiled nothing, so a fork loses no threads.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    work = [tasks[index] for index in share]
    process = context.Process(target=measure_share, args=(work, sender, log))
    process.start()
    # Only the worker holds this end now, so its death closes the pipe.
    sender.close()
    return receiver, Worker(process, share, log)


def measure_share(tasks: Sequence[Task], sender: Connection, log: Path) -> None:
    """Send the outcome of one task after the other; the compiler's output goes to `log`."""
    with log.open("w+b") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        for task in tasks:
            file.seek(0)
            file.truncate()
            try:
                binary, ptx, dynamic_shared = compile_variant(task)
            except Exception as error:
                outcome: Outcome = summarize(f"{type(error).__name__}: {error}", log)
            else:
                outcome = read_resources(binary, ptx, dynamic_shared, task.capability)
            sender.send(outcome)


def summarize(message: str, log: Path) -> str:
    """Return the lines that name an error: a message or a log may be pages of code."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    telling = [line for line in lines[1:] if re.search("error|fatal|assert", line, re.IGNORECASE)]
    chosen = [lines[0], *(telling or lines[-1:])[:2]] if len(lines) > 1 else lines
    printed = log.read_text(encoding="utf-8", errors="replace").splitlines()
    chosen += [
        line.strip() for line in printed if re.search("error:|fatal|assertion", line, re.IGNORECASE)
    ][:2]
    return "; ".join(line[:200] for line in chosen)
