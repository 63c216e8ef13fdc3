"""Triton's driver: kernels that are launched on CPU tensors run on the machine for PTX."""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .counts import Counts
from .machine import Launch
from .memory import POISON
from .translation import Code, translate
from .warps import WARP

# Bytes of shared memory that a block may have, by compute capability.
MAX_SHARED = {70: 96 << 10, 75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10}
# Addresses are larger than numbers in tables.
SMALLEST_ADDRESS = 1 << 20


def install(capability: int, **options: bool) -> Driver:
    """Triton now compiles for this capability and launches on the machine.

    options: of `machine.Launch`. The assembler is left out: a kernel's binary is its PTX, so such
    kernels need a TRITON_CACHE_DIR of their own. Triton must not have been imported with
    TRITON_INTERPRET=1.
    """
    import triton
    from triton.backends import backends

    backends["nvidia"].compiler.make_cubin = lambda self, ptx, *_: ptx.encode()
    driver = Driver(capability, options)
    triton.runtime.driver.set_active(driver)
    # A translated program is a hundred thousand closures. With the thresholds that Python starts
    # with, collections that find no garbage among them take half of the time.
    gc.set_threshold(100_000, 20, 20)
    return driver


@lru_cache(maxsize=8)
def load(ptx: str) -> Code:
    return translate(ptx)


class Driver:
    """The functions that Triton calls, and the counts of the launches so far by kernel.

    capability: may be changed between launches, and is Triton's number of the device, by which it
    keeps what it has compiled. rewrite: changes a kernel's PTX before it runs.
    """

    def __init__(self, capability: int, options: dict[str, bool]) -> None:
        self.capability, self.options = capability, options
        self.counts: dict[str, Counts] = defaultdict(Counts)
        self.num_launches: dict[str, int] = defaultdict(int)
        self.rewrite: Callable[[str], str] = lambda ptx: ptx
        self.utils = self

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, WARP)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": MAX_SHARED[device]}

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: int
    ) -> tuple[None, str, int, int, int]:
        """Module, function, registers, spills, and the most threads of a block."""
        return None, binary.decode(), 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        kinds = list(source.signature.values())

        def launch(
            x: int, y: int, z: int, stream: int, ptx: str, packed: Any, launch_metadata: Any,
            enter: Any, leave: Any, *arguments: Any,
        ) -> None:  # fmt: skip
            code = load(self.rewrite(ptx))
            given = [
                (kind, value)
                for kind, value in zip(kinds, arguments, strict=True)
                if kind != "constexpr"
            ]
            parameters = [pack(kind, value) for kind, value in given]
            # Scratch memory of the runtime, which these kernels do not use.
            parameters += [bytes(8)] * (len(code.program.parameters) - len(parameters))
            tensors = [value for _, value in given if isinstance(value, Tensor)]
            extents = [extent(tensor) for tensor in (*tensors, *named_in_tables(tensors))]
            done = Launch(code, (x, y, z), metadata.shared, parameters, extents, **self.options)
            name = code.program.name
            self.num_launches[name] += 1
            self.counts[name] += done.run()

        return launch


def extent(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte of a tensor's elements and of the byte after the last."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), tensor.data_ptr()
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in sizes)
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def named_in_tables(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors whose addresses an int64 tensor holds: a kernel may access them, too."""
    addresses = {
        number
        for tensor in tensors
        if tensor.dtype == torch.int64
        for number in tensor.flatten().tolist()
        if number >= SMALLEST_ADDRESS
    }
    if not addresses:
        return []
    alive = (each for each in gc.get_objects() if issubclass(type(each), Tensor))
    return [tensor for tensor in alive if tensor.data_ptr() in addresses]


def pack(kind: str, value: Any) -> bytes:
    """A launch argument as the bytes of a kernel's parameter."""
    if kind.startswith("*"):
        return np.uint64(value.data_ptr() if isinstance(value, Tensor) else value or 0).tobytes()
    if kind in ("fp32", "f32"):
        return np.float32(value).tobytes()
    if kind in ("fp64", "f64"):
        return np.float64(value).tobytes()
    size = max(1, int(kind[1:]) // 8)
    return int(value).to_bytes(size, "little", signed=value < 0)


def poison(tensor: Tensor) -> None:
    """Gives a tensor without gaps values that no kernel writes: reads of them are uninitialised."""
    if tensor.element_size() > 1 and tensor.numel() > 0:
        flat = tensor.detach().as_strided((tensor.numel(),), (1,))
        flat.view(torch.int16).fill_(POISON[2])
