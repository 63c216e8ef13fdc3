"""Threads of a parallel region that meet on a core are moved apart."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from fusedacl.kernels.support import c_loops

REGIONS = 70

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


def regions(program: str, cores: Sequence[int]) -> list[tuple[bool, ...]]:
    """For each region: its threads ended on one core, the second may use the cores it had."""
    environment = {name: value for name, value in os.environ.items() if "OMP_" not in name}
    printed = subprocess.run(
        [program, *map(str, cores)], env=environment, capture_output=True, text=True, check=True,
        timeout=60,
    ).stdout  # fmt: skip
    found = [tuple(value == "1" for value in line.split()) for line in printed.splitlines()]
    assert len(found) == REGIONS
    return found


@pytest.mark.parametrize("number", [None, 2])
def test_threads_that_met_are_parted(program: str, number: int | None) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("one core")
    found = regions(program, () if number is None else cores[:number])
    # The kernel may move a thread back before it looks where it is.
    assert sum(same for same, _ in found) <= REGIONS // 10
    assert all(restored for _, restored in found)


def test_one_core_for_both(program: str) -> None:
    assert regions(program, [min(os.sched_getaffinity(0))]) == [(True, True)] * REGIONS
