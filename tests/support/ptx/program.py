"""PTX text, parsed into basic blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

# Bytes of a type by the number in its name.
SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}
TERMINATORS = {"bra": "branch", "brx": "table", "ret": "exit", "exit": "exit", "bar": "barrier"}


class PtxError(RuntimeError):
    """The program does what it must not do, or has an instruction that the machine lacks."""


@dataclass(frozen=True)
class Instruction:
    """`@guard opcode operands`; the guard is negated for `@!guard`. source: file and line."""

    guard: str | None
    negated: bool
    opcode: str
    operands: tuple[str, ...]
    source: str

    @cached_property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @cached_property
    def suffixes(self) -> tuple[str, ...]:
        return tuple(self.opcode.split(".")[1:])

    def __str__(self) -> str:
        guard = "" if self.guard is None else f"@{'!' * self.negated}{self.guard} "
        return f"{guard}{self.opcode} {', '.join(self.operands)} ({self.source})"


@dataclass
class Block:
    """A basic block: instructions without a jump, and how it ends.

    ending: "next" (falls through), "branch", "table", "barrier" or "exit".
    last: the instruction that ends it, unless it falls through.
    targets: numbers of the blocks to which a branch or a table leads.
    """

    instructions: list[Instruction]
    ending: str = "next"
    last: Instruction | None = None
    targets: list[int] = field(default_factory=list)


@dataclass
class Program:
    """A kernel.

    parameters: name -> position. kinds: "pred", "b16", "b32" or "b64" by the prefix of a register
    ("%rd"). A jump to the end goes to block number len(blocks). threads: of a block of the grid.
    granularity: bytes of the narrowest access by address space.
    """

    name: str
    target: str
    parameters: dict[str, int]
    kinds: dict[str, str]
    blocks: list[Block]
    threads: int
    granularity: dict[str, int]

    def kind_of(self, register: str) -> str | None:
        """The type of a register, None for what is no register."""
        prefix = re.fullmatch(r"(%[a-z]+)\d+", register)
        return self.kinds.get(prefix[1]) if prefix else None


def split_operands(text: str) -> tuple[str, ...]:
    """Splits at the commas outside braces and brackets."""
    return tuple(part.strip() for part in re.split(r",(?![^{\[]*[}\]])", text) if part.strip())


def elements(operand: str) -> tuple[str, ...]:
    """The registers of `{%r1, %r2}`, or the one operand."""
    return split_operands(operand[1:-1]) if operand.startswith("{") else (operand,)


def statements(body: str) -> Iterator[tuple[str, str]]:
    """Labels ("name:") and instructions of a kernel, each with its line in the Python source."""
    source, pending = "?", ""
    for line in body.splitlines():
        code, _, comment = line.partition("//")
        if code.lstrip().startswith(".loc"):
            source = comment.strip() or source
            continue
        pending = f"{pending} {code.strip()}".strip()
        while found := re.match(r"([\w$]+:)(?!:)\s*|([^;]*);\s*", pending):
            pending = pending[found.end() :]
            yield (found[1] or found[2]).strip(), source


def parse(ptx: str) -> Program:
    """The one kernel of a PTX file."""
    head = re.search(r"\.visible \.entry (\w+)\((.*?)\)(.*?)\{\n(.*)^\}", ptx, re.DOTALL | re.M)
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    if head is None or target is None:
        raise PtxError("there is no kernel in this PTX")
    name, parameters, attributes, body = head.groups()
    size = re.search(r"\.reqntid (\d+)", attributes)
    if size is None:
        raise PtxError(f"{name} has no .reqntid: the number of threads in a block")
    kinds: dict[str, str] = {}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    tables: dict[str, tuple[str, ...]] = {}
    label = ""
    for statement, source in statements(body):
        if statement.endswith(":"):
            label = statement[:-1]
            labels[label] = len(instructions)
        elif statement.startswith(".branchtargets"):
            tables[label] = split_operands(statement.removeprefix(".branchtargets"))
        elif statement.startswith(".reg"):
            _, kind, prefix = statement.split(None, 2)
            kinds[prefix.partition("<")[0]] = kind[1:]
        elif statement and not statement.startswith((".pragma", "{", "}")):
            found = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)", statement, re.DOTALL)
            if found is None:
                raise PtxError(f"cannot parse {statement!r} ({source})")
            negated, guard, opcode, operands = found.groups()
            instructions.append(
                Instruction(guard, negated == "!", opcode, split_operands(operands), source)
            )
    return Program(
        name,
        target[1],
        {parameter: index for index, parameter in enumerate(re.findall(r"\w+(?=,|$)", parameters))},
        kinds,
        basic_blocks(instructions, labels, tables),
        int(size[1]),
        granularity(instructions),
    )


def ends_block(instruction: Instruction) -> bool:
    """`bar.warp.sync` concerns a warp only, and is an instruction like others."""
    return instruction.name in TERMINATORS and "warp" not in instruction.suffixes


def basic_blocks(
    instructions: list[Instruction], labels: dict[str, int], tables: dict[str, tuple[str, ...]]
) -> list[Block]:
    starts = {0, *labels.values()}
    starts |= {index + 1 for index, each in enumerate(instructions) if ends_block(each)}
    ordered = sorted(start for start in starts if start < len(instructions))
    number_of = {start: number for number, start in enumerate(ordered)}

    def target(label: str) -> int:
        return number_of.get(labels[label], len(ordered))

    blocks = []
    for start, stop in zip(ordered, [*ordered[1:], len(instructions)], strict=True):
        block = Block(instructions[start:stop])
        if ends_block(block.instructions[-1]):
            last = block.last = block.instructions.pop()
            block.ending = TERMINATORS[last.name]
            if block.ending == "branch":
                block.targets = [target(last.operands[0])]
            elif block.ending == "exit" and last.guard:
                block.ending, block.targets = "branch", [len(ordered)]
            elif block.ending == "table":
                block.targets = [target(label) for label in tables[last.operands[1]]]
            elif block.ending == "barrier" and (last.guard, last.opcode, last.operands) != (
                None, "bar.sync", ("0",),
            ):  # fmt: skip
                raise PtxError(f"unknown barrier: {last}")
        blocks.append(block)
    return blocks


def granularity(instructions: list[Instruction]) -> dict[str, int]:
    narrowest = {"shared": 4, "global": 4}
    for each in instructions:
        if each.name in ("ld", "st") and each.suffixes[0] in narrowest:
            space, width = each.suffixes[0], SIZES[each.suffixes[-1][1:]]
            narrowest[space] = min(narrowest[space], width)
    return narrowest
