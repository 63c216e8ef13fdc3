"""The package's C loops for the CPU."""

import ctypes
import functools
import importlib.util


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """Load the C loop of that module, compiled at installation; None where there is none.

    Must be called after the import of torch, so that the loop uses the threads of PyTorch's OpenMP.
    """
    spec = importlib.util.find_spec(f"fusedacl.kernels.{name}")
    return None if spec is None or spec.origin is None else ctypes.CDLL(spec.origin)
