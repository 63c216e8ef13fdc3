"""Work of the kernels by unit, counted on the machine for PTX, beside the accepted counts."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from kernel_counts import __main__ as kernel_counts
from kernel_counts import model
from kernel_counts.cases import Work
from ptx.counts import Counts

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
PAGE = ROOT / "docs" / "gpu_by_the_model.md"


def test_counts_are_those_accepted() -> None:
    """In a process of its own, for Triton's interpreter must not be there."""
    environment = os.environ | {
        # Compiled code serves all later runs; it holds no binaries.
        "TRITON_CACHE_DIR": str(ROOT / "build" / "ptx"),
        "PYTHONPATH": os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")]),
        "CUDA_VISIBLE_DEVICES": "",
        "TRITON_INTERPRET": "0",
    }
    done = subprocess.run(
        [sys.executable, "-m", "kernel_counts", "--small"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "sm_89: row_sums_kernel" in done.stdout


@pytest.fixture
def accepted() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(kernel_counts.ACCEPTED.read_text("utf-8"))
    return found


def test_the_page_shows_the_accepted_counts(accepted: dict[str, Any]) -> None:
    page = PAGE.read_text("utf-8")
    assert kernel_counts.page_with(page, accepted) == page, "run python -m kernel_counts --write"
    with pytest.raises(ValueError, match="lacks the lines"):
        kernel_counts.page_with("no markers", accepted)


def test_changes_are_named(accepted: dict[str, Any]) -> None:
    found = copy.deepcopy(accepted["counts"])
    accepted["triton"] = kernel_counts.triton_version()
    assert kernel_counts.compare(accepted, found) == []
    kernel = next(iter(found["sm_70"]))
    found["sm_70"][kernel]["shared_passes"] += 1
    found["sm_70"]["another"] = found["sm_70"][kernel]
    changes = kernel_counts.compare(accepted, found)
    assert [kernel in changes[0], "another" in changes[1]] == [True, True]
    # With another Triton a half more is allowed.
    accepted["triton"] = "0.0"
    assert len(kernel_counts.compare(accepted, found)) == 1
    found["sm_70"][kernel]["shared_passes"] *= 2
    assert len(kernel_counts.compare(accepted, found)) == 2


def test_the_model_of_a_unit() -> None:
    """By hand: 1000 fused multiply-adds of warps take a V100's fp32 pipe 500 cycles."""
    counts = Counts(instructions=1600, fma=1000, fp32=1000, special=10, shared_passes=50)
    least = Work(torch.float32, multiply_adds=16000)
    cycles = model.unit_cycles(counts, least, model.CHIPS[70])
    assert model.largest(cycles) == ("fp32", 500)
    assert (cycles["issue"], cycles["special functions"]) == (400, 20)
    assert model.largest(model.floor_cycles(least, model.CHIPS[70])) == ("fp32", 250)
    # 900 GB/s are 7.35 bytes per cycle for each of 80 multiprocessors at 1.53 GHz.
    moved = Work(torch.float16, exponentials=176, bytes=73.53)
    unit, floor = model.largest(model.floor_cycles(moved, model.CHIPS[70]))
    assert (unit, floor) == ("special functions", 11)
    assert model.floor_cycles(moved, model.CHIPS[70])["memory"] == pytest.approx(10, rel=1e-3)
