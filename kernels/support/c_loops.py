"""The package's C loops for the CPU."""

import ctypes
import functools
import importlib.util
import zlib
from pathlib import Path


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """Load the C loop of a module, None where it is not built; after torch, to share its OpenMP.

    Raises:
        RuntimeError: in a checkout, it was built from other sources than those beside it.
    """
    spec = importlib.util.find_spec(f"fusedacl.kernels.{name}")
    if spec is None or spec.origin is None:
        return None
    loop = ctypes.CDLL(spec.origin)
    checksum = checksum_of(Path(spec.origin).parent)
    if checksum is not None and checksum != built_from(loop):
        # Arguments would be read at other places than they are written to.
        raise RuntimeError(
            f"{spec.origin} was built from other C files than those beside it: install the "
            "checkout again (pip install --no-deps --no-build-isolation -e .)."
        )
    return loop


def built_from(loop: ctypes.CDLL) -> int | None:
    """Return the checksum of a loop's sources; None for one that is older than checksums."""
    try:
        return ctypes.c_uint32.in_dll(loop, "fusedacl_sources").value
    except ValueError:
        return None


def checksum_of(folder: Path) -> int | None:
    """Return what setup.py computes from a folder's C files and the headers here; None without."""
    files = [*sorted(folder.glob("*.c")), *sorted(folder.glob("*.h"))]
    if not files:
        return None
    files += sorted(Path(__file__).parent.glob("*.h"))
    return zlib.crc32(b"".join(file.read_bytes() for file in files))
