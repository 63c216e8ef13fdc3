"""Every kernel as the PTX that Triton compiles for a GPU, on the machine for PTX.

No access outside, misaligned, of uninitialised memory or in a race; results within twice the error
of eager PyTorch. Each group runs in a process of its own, for Triton's interpreter must not be
there. PTX_WHOLE=1 (`make ptx`) takes all of the kernels' tests on all three GPUs, without and with
errors of the size that the ISA allows approximate functions. Otherwise a V100 and an A100 run the
whole grid without errors, which compiles most; a T4, and both with errors, run a part of it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TESTS = Path(__file__).parents[1]
WHOLE = os.environ.get("PTX_WHOLE") == "1"
# Tracing has nothing to do with the kernels' code.
NO_TRACING = "not opcheck and not graph_break"

GRID = "ptx/kernel_grid.py"
MUTANTS = "ptx/mutants.py"
SMALL = "kernels/contrastive/gpu/test_small_batches.py"
LARGE = "kernels/contrastive/gpu/test_large_batches.py"
IMPLEMENTATIONS = "kernels/contrastive/test_implementations.py"
PAIRS = "kernels/contrastive/gpu/test_pair_sums.py"
TILED = "kernels/contrastive/tiled/test_gpu_epilogue.py"
GRADIENTS = "kernels/gradients/test_gpu.py"

# Compute capability, whether approximate functions have errors, files, and of how many cases of the
# grid one is taken.
Run = tuple[int, bool, tuple[str, ...], int]
FEW: list[Run] = [
    (70, False, (GRID, MUTANTS, f"{TILED}::test_label_layouts"), 1),
    (75, False, (GRID,), 5),
    (80, False, (GRID,), 1),
    (70, True, (GRID,), 4),
    (80, True, (GRID,), 4),
]
ALL: list[Run] = [
    (70, False, (MUTANTS,), 1),
    # Both kernels of the losses. With errors, gradients that are 0 by cancellation would not be.
    (80, False, (IMPLEMENTATIONS,), 1),
    *(
        (capability, errors, files, 1)
        for errors in (False, True)
        for capability, files in (
            (70, (GRID, SMALL)),
            (70, (TILED, GRADIENTS)),
            (75, (GRID, SMALL)),
            (75, (TILED, GRADIENTS)),
            (80, (GRID, SMALL, LARGE, PAIRS)),
        )
    ),
]


def name_of(run: Run) -> str:
    capability, errors, files, step = run
    names = ", ".join(Path(file).stem for file in files)
    part = f", one case of {step}" if step > 1 else ""
    return f"sm_{capability}{', with errors' * errors}: {names}{part}"


@pytest.mark.parametrize("run", ALL if WHOLE else FEW, ids=name_of)
def test_on_the_machine(run: Run) -> None:
    capability, errors, files, step = run
    environment = os.environ | {
        "PTX_CAPABILITY": str(capability),
        "PTX_ERRORS": str(int(errors)),
        "PTX_GRID_STEP": str(step),
        # What was compiled serves all later runs; no binaries are among it.
        "TRITON_CACHE_DIR": str(TESTS.parent / "build" / "ptx"),
        "PYTHONPATH": os.pathsep.join([str(TESTS / "support"), os.environ.get("PYTHONPATH", "")]),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "ptx.pytest_plugin", "-k", NO_TRACING]
    command += ["-p", "no:cacheprovider", "-p", "no:randomly", *(str(TESTS / f) for f in files)]
    done = subprocess.run(
        command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-4000:]
    launches = re.search(r"launches of PTX for sm_\d+: (\d.*)", done.stdout)
    assert launches, done.stdout
    print(launches[0])
