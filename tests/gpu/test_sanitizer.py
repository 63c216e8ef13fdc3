"""NVIDIA's compute-sanitizer over the small grid: no access out of bounds, no race."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("small_grid.py")
CASES = Path(__file__).parent.parent / "support"
FOUND_ERRORS = 9


def sanitizer() -> str:
    found = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if found is None:
        pytest.skip("compute-sanitizer is not on PATH (it comes with the CUDA toolkit)")
    return found


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("name", ["supcon_small", "supcon_fused", "tiled", "gradients"])
def test_nothing_is_found(name: str, tool: str) -> None:
    if name == "supcon_fused" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("supcon_fused needs compute capability 8.0")
    environment = os.environ | {
        # Every tensor an allocation of its own, so that its end is known.
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTHONPATH": os.pathsep.join([str(CASES), os.environ.get("PYTHONPATH", "")]),
    }
    environment.pop("TRITON_INTERPRET", None)
    # PyTorch tries calls that may fail, and handles it.
    options = ["--tool", tool, "--error-exitcode", str(FOUND_ERRORS), "--report-api-errors", "no"]
    command = [sanitizer(), *options, sys.executable, str(SCRIPT), name]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=1800, check=False
    )
    printed = done.stdout[-4000:] + done.stderr[-4000:]
    if "Device not supported" in printed:
        pytest.skip("compute-sanitizer does not support this device or driver")
    assert done.returncode == 0, printed
    assert f"{name}: right" in done.stdout
