"""Instructions as functions of all threads at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from . import sm_80, warps
from .number_types import Array, bits_of, constant, dtype_of, size_of
from .operations import Operation, operation
from .program import Block, Instruction, Program, PtxError, elements, parse

if TYPE_CHECKING:
    from .machine import Mask, Threads

# What the threads of a mask do.
Step = Callable[["Threads", "Mask"], None]
Read = Callable[["Threads"], Array]
Write = Callable[["Threads", Array, "Mask"], None]

SPECIAL_REGISTERS = {f"%{name}.{axis}" for name in ("tid", "ctaid", "nctaid") for axis in "xyz"}
SPECIAL_REGISTERS |= {"%ntid.x", "%laneid"}
# The array of shared memory that Triton's kernels have; it starts at address 0.
SHARED_ARRAY = "global_smem"
# They say how caches treat an access.
HINTS = {"cta", "volatile", "ca", "cg", "cs", "nc"}


@dataclass
class Code:
    """A program that can run.

    registers: type of each register. steps: of each block. decide: of each block that ends with a
    branch or a table, the predicate or the index that it takes.
    """

    program: Program
    registers: list[str]
    steps: list[list[Step]]
    decide: list[Read | None]


def translate(ptx: str) -> Code:
    translator = Translator(parse(ptx))
    program = translator.program
    steps = [
        [translator.step(instruction) for instruction in block.instructions]
        for block in program.blocks
    ]
    decide = [translator.decision(block) for block in program.blocks]
    return Code(program, list(translator.kinds), steps, decide)


class Translator:
    """Gives each register that occurs a number, in the order of `kinds`."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.numbers: dict[str, int] = {}
        self.kinds: list[str] = []

    # Operands

    def number(self, register: str) -> int | None:
        if register in self.numbers:
            return self.numbers[register]
        kind = self.program.kind_of(register)
        if kind is None:
            return None
        self.numbers[register] = len(self.kinds)
        self.kinds.append(kind)
        return self.numbers[register]

    def read(self, operand: str, kind: str) -> Read:
        """The operand as numbers of a type: an array, or one number for a constant."""
        number = self.number(operand)
        if operand in SPECIAL_REGISTERS:
            return lambda threads: threads.special[operand]
        if number is None:
            value = constant("0" if operand == SHARED_ARRAY else operand, kind)
            return lambda threads: value
        held, dtype = self.kinds[number], dtype_of(kind)
        if held == "pred":
            return lambda threads: threads.registers[number]
        if size_of(held) == size_of(kind):
            return lambda threads: threads.registers[number].view(dtype)
        narrow = bits_of(kind)
        return lambda threads: threads.registers[number].astype(narrow).view(dtype)

    def write(self, operand: str, kind: str) -> Write:
        """Puts numbers of a type into a register; signed ones are extended by their sign."""
        if operand == "_":
            return lambda threads, value, mask: None
        number = self.number(operand)
        if number is None:
            raise PtxError(f"{operand} is no register")
        held, dtype = self.kinds[number], dtype_of(kind)
        bits = bits_of(held)
        widens = held != "pred" and size_of(held) != size_of(kind)
        wide = dtype_of(kind[0] + held[1:]) if widens else dtype

        def put(threads: Threads, value: Array, mask: Mask) -> None:
            value = np.asarray(value, dtype)
            if widens:
                value = value.astype(wide)
            value = value.view(bits)
            if mask is not None:
                value = np.where(mask, value, threads.registers[number])
            elif value.ndim == 0:
                value = np.full(threads.total, value)
            threads.registers[number] = value

        return put

    def address(self, operand: str, space: str) -> Read:
        base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
        kind = "u64" if space == "global" else "u32"
        start = self.read(base, kind)
        # A negative offset wraps around, as the sum does.
        distance = constant(offset or "0", kind)
        if not distance:
            return lambda threads: threads.full(start(threads))
        return lambda threads: threads.full(start(threads) + distance)

    # Instructions

    def step(self, instruction: Instruction) -> Step:
        plain = self.unguarded(instruction)
        if instruction.guard is None:
            return plain
        guard, negated = self.read(instruction.guard, "pred"), instruction.negated

        def guarded(threads: Threads, mask: Mask) -> None:
            allowed = ~guard(threads) if negated else guard(threads)
            if mask is not None:
                allowed = allowed & mask
            elif allowed.all():
                plain(threads, None)
                return
            if allowed.any():
                plain(threads, allowed)

        return guarded

    def unguarded(self, instruction: Instruction) -> Step:
        found = operation(instruction)
        if found is not None:
            return self.compute(instruction, found)
        of_threads = {"mov": self.move, "ld": self.load, "st": self.store}
        if instruction.name in of_threads:
            return of_threads[instruction.name](instruction)
        define = (warps.STEPS | sm_80.STEPS).get(instruction.name)
        step = None if define is None else define(self, instruction)
        if step is None:
            raise PtxError(f"unknown instruction: {instruction}")
        return step

    def decision(self, block: Block) -> Read | None:
        last = block.last
        if last is None or block.ending not in ("branch", "table"):
            return None
        if block.ending == "table":
            return self.read(last.operands[0], "u32")
        if last.guard is None:
            return None
        guard = self.read(last.guard, "pred")
        return (lambda threads: ~guard(threads)) if last.negated else guard

    def compute(self, instruction: Instruction, found: Operation) -> Step:
        target, *operands = instruction.operands
        put = self.write(target, found.result)
        # Constants that `bfe` has taken in are left over.
        sources = [
            self.read(operand, kind) for operand, kind in zip(operands, found.sources, strict=False)
        ]
        function, error = found.function, found.relative_error
        if error:

            def run(threads: Threads, mask: Mask) -> None:
                value = function(*(source(threads) for source in sources))
                put(threads, threads.disturb(value, error), mask)

        elif len(sources) == 2:
            first, second = sources

            def run(threads: Threads, mask: Mask) -> None:
                put(threads, function(first(threads), second(threads)), mask)

        else:

            def run(threads: Threads, mask: Mask) -> None:
                put(threads, function(*(source(threads) for source in sources)), mask)

        return run

    def move(self, instruction: Instruction) -> Step:
        """mov, also between a register and the parts of which it consists."""
        target, source = instruction.operands
        kind = instruction.suffixes[-1]
        if not target.startswith("{") and not source.startswith("{"):
            return self.compute(instruction, Operation((kind,), kind, lambda value: value))
        parts = elements(target if target.startswith("{") else source)
        part_kind = f"b{8 * size_of(kind) // len(parts)}"
        part, whole = dtype_of(part_kind), dtype_of("b" + kind[1:])
        if target.startswith("{"):
            read = self.read(source, "b" + kind[1:])
            puts = [self.write(name, part_kind) for name in parts]

            def split(threads: Threads, mask: Mask) -> None:
                values = np.ascontiguousarray(threads.full(read(threads)))
                for put, value in zip(
                    puts, values.view(part).reshape(-1, len(parts)).T, strict=True
                ):
                    put(threads, np.ascontiguousarray(value), mask)

            return split
        reads = [self.read(name, part_kind) for name in parts]
        put_whole = self.write(target, "b" + kind[1:])

        def join(threads: Threads, mask: Mask) -> None:
            values = np.stack([threads.full(read(threads)) for read in reads], 1)
            put_whole(threads, values.view(whole).ravel(), mask)

        return join

    # Memory

    def access(self, instruction: Instruction) -> tuple[str, int, int]:
        """Address space, bytes of a number, and how many numbers a thread accesses."""
        space, *qualifiers, kind = instruction.suffixes
        count = 1
        for qualifier in qualifiers:
            if qualifier in ("v2", "v4"):
                count = int(qualifier[1])
            elif qualifier not in HINTS and not qualifier.startswith(("L1::", "L2::")):
                raise PtxError(f"unknown qualifier {qualifier}: {instruction}")
        if space not in ("global", "shared"):
            raise PtxError(f"unknown address space: {instruction}")
        return space, size_of(kind), count

    def load(self, instruction: Instruction) -> Step:
        target, source = instruction.operands
        kind = instruction.suffixes[-1]
        if instruction.suffixes[0] == "param":
            index, dtype = self.program.parameters[source.strip("[] ")], dtype_of(kind)
            put = self.write(target, kind)
            return lambda threads, mask: put(threads, threads.parameter(index, dtype), mask)
        space, width, count = self.access(instruction)
        address = self.address(source, space)
        loaded = kind if kind[0] == "s" else f"b{8 * width}"
        puts = [self.write(name, loaded) for name in elements(target)]
        dtype = dtype_of(loaded)

        def run(threads: Threads, mask: Mask) -> None:
            found = threads.load(space, address(threads), width, count, mask, instruction)
            columns = np.ascontiguousarray(found.T)
            if mask is not None:
                some, columns = columns, np.zeros((count, threads.total), found.dtype)
                columns[:, mask] = some
            for put, column in zip(puts, columns, strict=True):
                put(threads, column.view(dtype), mask)

        return run

    def store(self, instruction: Instruction) -> Step:
        space, width, count = self.access(instruction)
        address = self.address(instruction.operands[0], space)
        sources = [self.read(name, f"b{8 * width}") for name in elements(instruction.operands[1])]
        if len(sources) != count:
            raise PtxError(f"the number of operands is wrong: {instruction}")

        def run(threads: Threads, mask: Mask) -> None:
            values = np.stack([threads.full(source(threads)) for source in sources], 1)
            threads.store(space, address(threads), values, mask, instruction)

        return run
