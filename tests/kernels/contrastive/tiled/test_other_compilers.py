"""The C loops as clang compiles them, and for ARM, whose processor qemu stands in for."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contrastive_cases import DENOMINATORS, LABELS, check_error, make_inputs
from fusedacl.kernels.contrastive.tiled import cpu_loop, cpu_triangle
from wider_cases import check, make_problem

SOURCES = Path(cpu_loop.__file__).parent
COMPILERS: dict[str, tuple[list[str], list[str]]] = {
    "clang": (["clang"], []),
    "ARM": (["aarch64-linux-gnu-gcc", "-static", "-fopenmp"], ["qemu-aarch64"]),
}
SIZES = (
    "num_exits", "num_samples", "num_labels", "num_copies", "width", "ignore_index", "denominator",
    "reduction", "num_memory",
)  # fmt: skip
BYTES = {0: 4, 1: 2, 2: 2}
THREADS = 2


class OtherLoop:
    """The functions of the compiled loops, called in a program that another compiler has made."""

    def __init__(self, command: list[str], directory: Path) -> None:
        self.command, self.directory = command, directory
        self.calls: list[str] = []

    def supcon_scratch(self, problem: Any) -> int:
        return 0

    def supcon_triangle_scratch(self, problem: Any, capacity: int, threads: int) -> int:
        return 0

    def supcon_vectors(self) -> int:
        return 0

    def supcon_use_large_pages(self, memory: int, size: int) -> None:
        pass

    def supcon_loss(self, problem: cpu_loop.Problem, scratch: int, threads: int) -> int:
        return self._run("loss", problem, 0)

    def supcon_triangle(
        self, problem: cpu_loop.Problem, scratch: int, tiles: int, capacity: int, *others: int
    ) -> int:
        return self._run("triangle", problem, capacity)

    def _run(self, name: str, problem: cpu_loop.Problem, capacity: int) -> int:
        self.calls.append(name)
        sizes = [getattr(problem, size) for size in SIZES]
        num_exits, num_samples, num_labels, _, width = sizes[:5]
        num_memory, num_trained = sizes[-1], num_exits * (num_samples + num_labels)
        rows = (
            num_exits * num_samples, num_exits * num_labels, num_samples, num_labels, num_memory
        )  # fmt: skip
        with (self.directory / "in").open("wb") as file:
            for numbers in (sizes, [name == "triangle", capacity, THREADS]):
                file.write(np.array(numbers, np.int64).tobytes())
            file.write(np.float64(problem.temperature).tobytes())
            for part, number in enumerate(rows):
                kind, address = problem.dtypes[part], problem.parts[part]
                size = number * width * BYTES[kind] if address else 0
                file.write(np.array([kind, size], np.int64).tobytes())
                file.write(ctypes.string_at(address, size) if size else b"")
            file.write(ctypes.string_at(problem.labels, 8 * (num_samples + num_memory)))
        files = [str(self.directory / name) for name in ("in", "out")]
        subprocess.run([*self.command, *files], check=True, timeout=120)
        found = (self.directory / "out").read_bytes()
        start = 8
        for address, size in (
            (problem.losses, num_exits),
            (problem.gradient, num_trained * width),
            (problem.products, num_trained),
        ):
            if address:
                ctypes.memmove(address, found[start : start + 4 * size], 4 * size)
            start += 4 * size
        return int.from_bytes(found[:8], "little", signed=True)


@pytest.fixture(scope="module", params=COMPILERS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    compiler, emulator = COMPILERS[request.param]
    missing = [name for name in (compiler[0], *emulator) if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    made = tmp_path_factory.mktemp("compiled") / "run_loop"
    files = [Path(__file__).with_name("run_loop.c"), *SOURCES.glob("*.c")]
    subprocess.run(
        [*compiler, "-O3", f"-I{SOURCES}", *map(str, files), "-lm", "-o", str(made)],
        check=True, timeout=120, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return [*emulator, str(made)]


@pytest.fixture
def other(program: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OtherLoop:
    loop = OtherLoop(program, tmp_path)
    for module in (cpu_loop, cpu_triangle):
        monkeypatch.setattr(module, "compiled_loop", lambda: loop)
    return loop


# Exits, samples, width, label embeddings, teacher.
SHAPES = ((None, 5, 33, None, False), (2, 17, 16, 3, False), (3, 9, 65, 11, True))


@pytest.mark.parametrize("shape", SHAPES)
def test_small_batches(other: OtherLoop, shape: tuple[Any, ...]) -> None:
    exits, samples, width, num_labels, teacher = shape
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    for denominator, dtype in itertools.product(DENOMINATORS, dtypes):
        inputs = make_inputs(
            samples, num_labels, width=width, dtype=dtype, exits=exits, teacher=teacher
        )
        labels = LABELS["ignored"](samples, num_labels or 3)
        check_error(inputs, labels, impl="tiled", denominator=denominator)
    assert set(other.calls) == {"loss"}


@pytest.mark.parametrize("shape", SHAPES)
def test_tiles(other: OtherLoop, shape: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than a tile has, with memory for one tile or for all."""
    monkeypatch.setattr(cpu_loop, "MAX_ROWS", 0)
    exits, _, width, num_labels, teacher = shape
    for denominator, memory in itertools.product(DENOMINATORS, (1, 100)):
        monkeypatch.setattr(cpu_triangle, "num_tiles", lambda *arguments, most=memory: most)
        inputs = make_inputs(
            110, num_labels, width=width, dtype=torch.float32, exits=exits, teacher=teacher
        )
        labels = LABELS["ignored"](110, num_labels or 3)
        check_error(inputs, labels, impl="tiled", denominator=denominator, temperature=0.2)
    assert set(other.calls) == {"triangle"}


@pytest.mark.parametrize("change", [{"memory": 130}, {"temperature": "scalar"}], ids=str)
def test_wider_losses(other: OtherLoop, change: dict[str, Any]) -> None:
    for denominator in DENOMINATORS:
        check(make_problem(50, "ignored", width=33, denominator=denominator, **change), "tiled")
    assert set(other.calls) == {"triangle" if "memory" in change else "loss"}
