"""The parts of a session on a GPU, in the order of what is most worth knowing."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from .session import Part

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
PYTHON = sys.executable
# Kernels as a V100 runs them, sizes of real use, nothing that waits for the device, CUDA graphs.
ESSENTIALS = (
    "tests/gpu/test_small_grid.py::test_the_code_of_a_v100_equals_the_reference",
    "tests/gpu/test_contrastive.py",
    "tests/gpu/test_gradients.py",
    "tests/gpu/test_no_sync.py",
    "tests/gpu/test_cuda_graph.py",
)
BUDGET = 570


def all_parts(directory: Path, device: str = "cuda") -> list[Part]:
    """Return the parts for results in `directory`; on the CPU, tiny ones that rehearse them.

    There Triton's interpreter runs the kernels, and there is nothing to tune.
    """
    if not (ROOT / "tests").is_dir():
        raise ValueError(
            f"{ROOT} has no tests/: run this in a checkout, installed with "
            "pip install --no-deps --no-build-isolation -e ."
        )
    rehearsed = device == "cpu"
    out = ("--output_dir", str(directory))
    # Tiles that were tuned in an earlier session are used in this one.
    paths = [str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "FUSEDACL_CACHE": str(directory)}
    if rehearsed:
        environment["TRITON_INTERPRET"] = "1"

    def module(name: str, *arguments: str) -> tuple[str, ...]:
        return (PYTHON, "-m", name, *arguments)

    def bench(*arguments: str) -> tuple[str, ...]:
        return module("fusedacl.benchmarks", *arguments, "--device", device, *out)

    grid = (PYTHON, str(ROOT / "tests" / "gpu" / "small_grid.py"), "--few")
    tests = [str(ROOT / name) for name in ESSENTIALS]
    # A file whose imports are not there, such as pyarrow, does not stop the others.
    pytest = module("pytest", "-v", "-p", "no:cacheprovider", "--maxfail=5")
    essentials = (*pytest, "--continue-on-collection-errors", *tests)
    # Small sizes first: what does not end in its time is the largest case.
    loss = bench(
        "loss", "--preset", "quick", "--losses", "supcon,acl", "--rows", "4096,16384,65536",
        "--widths", "64,768", "--dtypes", "float16", "--exits", "1,11", "--case_seconds", "6",
    )  # fmt: skip
    angle = bench(
        "angle", "--preset", "quick", "--parameters", "109482240", "--dtypes", "float32,float16",
        "--case_seconds", "4",
    )  # fmt: skip
    # The width for which the model and the tiles differ most first.
    tuning = module("fusedacl.kernels.tuning", "--quick", "--width", "768", "64", "256")
    steps = module("fusedacl.benchmarks.gpu.steps", "--device", device, *out)
    if rehearsed:
        essentials = (*pytest, "--collect-only", "-q", *tests)
        sizes = ("--rounds", "1", "--case_seconds", "0.1", "--peaks", "false")
        loss = bench(
            "loss", "--preset", "quick", "--losses", "supcon,acl", "--rows", "64", "--exits", "1",
            *sizes,
        )  # fmt: skip
        angle = bench("angle", "--preset", "quick", "--parameters", "100000", *sizes)
        tuning = module("fusedacl.kernels.tuning", "--help")
        steps = (*steps, "--tiny")
    commands = (
        ("smoke", "A smoke test of every kernel, against float64", 60, grid),
        ("essentials", "The tests that need a GPU, the code of a V100 first", 150, essentials),
        ("loss", "The loss beside its alternatives", 150, loss),
        ("angle", "The angle and the gate beside their alternatives", 60, angle),
        ("tuning", "Tiles, and supcon_fused against tiled", 90, tuning),
        ("steps", "A training step with and without the gate", 60, steps),
    )
    return [Part(*command, environment) for command in commands]
