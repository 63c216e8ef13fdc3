"""Threads of a parallel region are kept on different cores where they met lately."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fusedacl.kernels.support import c_loops

REGIONS, LATELY = 70, 64

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("gcc") is None, reason="needs Linux and gcc"
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = str(tmp_path_factory.mktemp("compiled") / "cores")
    headers = Path(c_loops.__file__).parent
    source = Path(__file__).with_name("cores.c")
    subprocess.run(["gcc", "-fopenmp", f"-I{headers}", str(source), "-o", made], check=True)
    return made


def rows_of(program: str, meetings: int, cores: set[int]) -> list[tuple[bool, ...]]:
    """For each region: threads on one core at its end, one was kept off, its cores restored."""
    printed = subprocess.run(
        [program, str(meetings)], capture_output=True, text=True, check=True, timeout=60,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    ).stdout  # fmt: skip
    rows = [tuple(value == "1" for value in line.split()) for line in printed.splitlines()]
    assert len(rows) == REGIONS
    return rows


@pytest.fixture
def two_cores() -> set[int]:
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        pytest.skip("one core")
    return set(cores)


def test_threads_that_met_are_parted_for_some_regions(program: str, two_cores: set[int]) -> None:
    parted = [(False, True, True)] * LATELY
    assert rows_of(program, 1, two_cores) == parted + [(False, False, True)] * (REGIONS - LATELY)


def test_threads_that_never_met_are_left_alone(program: str, two_cores: set[int]) -> None:
    assert rows_of(program, 0, two_cores) == [(False, False, True)] * REGIONS


def test_one_core_for_both(program: str) -> None:
    rows = rows_of(program, REGIONS, {min(os.sched_getaffinity(0))})
    assert rows == [(True, False, True)] * REGIONS
