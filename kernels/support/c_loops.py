"""The package's C loops for the CPU."""

import ctypes
import functools
import importlib.util


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """Load the C loop of a module, None where it is not built; after torch, to share its OpenMP."""
    spec = importlib.util.find_spec(f"fusedacl.kernels.{name}")
    return None if spec is None or spec.origin is None else ctypes.CDLL(spec.origin)
