"""small_grid.py as it is, under NVIDIA's compute-sanitizer, and with the code of a V100."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("small_grid.py")
SUPPORT = Path(__file__).parents[1] / "support"
KERNELS = ("supcon_small", "supcon_fused", "tiled", "gradients")
FOUND_ERRORS = 9


def run_small_grid(*arguments: str, under: tuple[str, ...] = (), **changes: str) -> str:
    """Output of the script; `under`: command of a tool that runs it, `changes`: environment."""
    environment = {**os.environ, **changes}
    environment["PYTHONPATH"] = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    if torch.cuda.is_available():
        environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [*under, sys.executable, str(SCRIPT), *arguments],
        env=environment, capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    printed = done.stdout[-4000:] + done.stderr[-4000:]
    if under and "Device not supported" in printed:
        pytest.skip("compute-sanitizer does not support this device or driver")
    assert done.returncode == 0, printed
    assert all(f"{name}: right" in done.stdout for name in arguments if name in KERNELS)
    return done.stdout


@pytest.mark.interpreter
def test_the_script_runs_without_a_gpu() -> None:
    """The interpreter runs it, so that a renamed kernel is noticed before a GPU is at hand."""
    run_small_grid(*KERNELS)
    # As `make gpu` calls it.
    assert "tiled: right" in run_small_grid("--few")


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("name", KERNELS)
def test_the_sanitizer_finds_no_bad_access_and_no_race(name: str, tool: str) -> None:
    if name == "supcon_fused" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("supcon_fused needs compute capability 8.0")
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on PATH (it comes with the CUDA toolkit)")
    # PyTorch makes calls that may fail and handles the errors: --report-api-errors no.
    options = ("--tool", tool, "--error-exitcode", str(FOUND_ERRORS), "--report-api-errors", "no")
    # Without PyTorch's cache each tensor is an allocation, whose end the sanitizer knows.
    run_small_grid(name, under=(sanitizer, *options), PYTORCH_NO_CUDA_MEMORY_CACHING="1")


@pytest.mark.parametrize("name", ["supcon_small", "tiled", "gradients"])
def test_the_code_of_a_v100_equals_the_reference(name: str, tmp_path: Path) -> None:
    # A cache of its own: these PTX files must not be mixed with other runs' binaries.
    printed = run_small_grid(name, "--as_volta", TRITON_CACHE_DIR=str(tmp_path))
    assert "kernels compiled for 7.0: " in printed
