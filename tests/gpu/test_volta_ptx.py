"""The code that a V100 runs, on whatever GPU is here: its PTX is compiled by the driver."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("small_grid.py")
CASES = Path(__file__).parent.parent / "support"


@pytest.mark.parametrize("name", ["supcon_small", "tiled", "gradients"])
def test_against_the_reference(name: str, tmp_path: Path) -> None:
    environment = os.environ | {
        # PTX in place of a binary belongs in no other cache, nor do others' binaries here.
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(CASES), os.environ.get("PYTHONPATH", "")]),
    }
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(SCRIPT), "--as_volta", name]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert f"{name}: right" in done.stdout
    assert "kernels compiled for 7.0: " in done.stdout
