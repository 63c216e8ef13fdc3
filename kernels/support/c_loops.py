"""The package's C loops for the CPU."""

import ctypes
import functools
import importlib.util


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """The loop of that module as it was compiled at installation, or None where there is none.

    Load it after torch: its threads are then those of PyTorch's OpenMP.
    """
    spec = importlib.util.find_spec(f"fusedacl.kernels.{name}")
    return None if spec is None or spec.origin is None else ctypes.CDLL(spec.origin)
