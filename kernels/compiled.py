"""The package's C loops for the CPU."""

import ctypes
import functools
import importlib.util


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """<name>.c as it was compiled at installation, or None where the package has no such file.

    Load it after torch: its threads are then those of PyTorch's OpenMP.
    """
    spec = importlib.util.find_spec(f"fusedacl.kernels._{name}")
    return None if spec is None or spec.origin is None else ctypes.CDLL(spec.origin)
