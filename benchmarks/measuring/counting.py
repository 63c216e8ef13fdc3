"""Counts of what a call does: operations, FLOPs, bytes, host reads; the same on any machine.

A dispatch mode sees every operation that PyTorch runs in the calling thread, including those of
backward passes. Triton kernels are recorded with their grids but not run, so that large grids cost
no time; their output tensors keep uninitialised values.
"""

import contextlib
import gc
import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

# Operations for which the host waits: they return a value to Python, or the shape of their result
# depends on values.
READS = frozenset(
    "_local_scalar_dense is_nonzero item nonzero masked_select _unique2 bincount equal".split()
)
# Host reads too if an index is a mask.
INDEXING = frozenset(("index", "index_put", "index_put_"))
# Methods that copy from a GPU and wait, but run no operation if the tensor is on the CPU.
SILENT_READS = ("tolist", "cpu", "numpy")
# FLOPs of products that PyTorch's own counter does not know.
OTHER_FLOPS: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("dot", "vdot"), lambda x, y, *_: 2 * x.numel()),
    "mv": lambda matrix, *_: 2 * matrix.numel(),
    "addmv": lambda bias, matrix, *_: 2 * matrix.numel(),
    "_scaled_dot_product_flash_attention_for_cpu": lambda q, k, v, *_: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    "_scaled_dot_product_flash_attention_for_cpu_backward": lambda gradient, q, k, v, *_: (
        sdpa_backward_flop_count(gradient.shape, q.shape, k.shape, v.shape)
    ),
}


@dataclass(frozen=True)
class Counts:
    """Counts of one call.

    operations: PyTorch operations by name, without host reads and collectives.
    flops: floating-point operations of matrix products; a multiply-add counts as two.
    allocated_bytes: bytes of all new storages; peak_bytes: the most that lived at one time.
    host_reads: number of reads by "function: operation"; each one may wait for a device.
    passes: forward calls of the watched modules.
    launches: Triton kernels with their grids; binaries: variants that a GPU would compile for them.
    collectives: collective operations by name.
    """

    operations: dict[str, int] = field(default_factory=dict)
    flops: int = 0
    allocated_bytes: int = 0
    peak_bytes: int = 0
    host_reads: dict[str, int] = field(default_factory=dict)
    passes: dict[str, int] = field(default_factory=dict)
    launches: dict[str, int] = field(default_factory=dict)
    binaries: int = 0
    collectives: dict[str, int] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """A dictionary for JSON, names in alphabetical order."""
        return {
            name: dict(sorted(value.items())) if isinstance(value, dict) else value
            for name, value in asdict(self).items()
        }


def count(
    call: Callable[[], object], watched: Mapping[str, Sequence[nn.Module]] | None = None
) -> tuple[Counts, Counter[str]]:
    """Run a call and return its counts, and its operations by "function: name".

    The function is the innermost one of this project that ran the operation.

    Args:
        watched: name -> modules whose forward calls are added up.
    """
    mode = _Counting()
    passes: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        for name, modules in (watched or {}).items():
            passes[name] = 0
            for module in modules:
                handle = module.register_forward_pre_hook(
                    lambda *_, name=name: passes.update([name])
                )
                stack.callback(handle.remove)
        for read in SILENT_READS:
            stack.enter_context(mock.patch.object(Tensor, read, mode.noted(read)))
        launches = stack.enter_context(_launches())
        if gc.isenabled():
            # Storages are freed only when their last reference goes.
            gc.disable()
            stack.callback(gc.enable)
        with mode:
            call()
    found = Counts(
        **{kind: dict(mode.counted[kind]) for kind in ("operations", "host_reads", "collectives")},
        flops=mode.flops,
        allocated_bytes=mode.allocated_bytes,
        peak_bytes=mode.peak_bytes,
        passes=dict(passes),
        launches=dict(Counter(text for text, _ in launches)),
        binaries=len({binary for _, binary in launches}),
    )
    return found, mode.counted["places"]


def is_host_read(name: str, arguments: Sequence[Any]) -> bool:
    """Return whether the host waits for the result of this operation; `name` without "aten::"."""
    masks = (torch.bool, torch.uint8)
    indices = arguments[1] if name in INDEXING else ()
    return name in READS or any(each is not None and each.dtype in masks for each in indices)


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        # Kind -> counts by name: operations, places, host_reads, collectives.
        self.counted: dict[str, Counter[str]] = defaultdict(Counter)
        self.flops = self.allocated_bytes = self.peak_bytes = 0
        self._live_bytes = 0
        # Address of a storage -> the storage, and its size when last seen.
        self._live: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # Composite operations arrive undivided in inference mode; elsewhere PyTorch splits them.
        if torch.is_inference_mode_enabled():
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        # Profiler ranges compute nothing.
        if name.startswith("profiler::"):
            return result
        self.counted["places"][f"{_place()}: {name}"] += 1
        self.flops += _flops(func, name, args, kwargs, result)
        if name.startswith("c10d::"):
            self.counted["collectives"][name.removeprefix("c10d::")] += 1
        elif is_host_read(name, args):
            self.counted["host_reads"][f"{_place()}: {name}"] += 1
        else:
            self.counted["operations"][name] += 1
        # The storage that `torch.tensor` made is new, although it arrives as an input.
        inputs = () if name == "lift_fresh" else (*args, *kwargs.values())
        self._note_storages(result, inputs)
        return result

    def noted(self, read: str) -> Callable[..., Any]:
        """A method of Tensor that also counts as a host read."""
        method = getattr(Tensor, read)

        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.counted["host_reads"][f"{_place()}: {read}"] += 1
            return method(tensor, *args, **kwargs)

        return call

    def _note_storages(self, result: Any, inputs: Any) -> None:
        before = {tensor.untyped_storage()._cdata for tensor in _tensors(inputs)}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            address, size = storage._cdata, storage.nbytes()
            if address not in self._live and address in before:
                continue
            if address not in self._live:
                self._live[address] = weakref.ref(storage, partial(self._forget, address)), 0
            reference, known = self._live[address]
            grown = size - known
            self._live[address] = reference, size
            self._live_bytes += grown
            self.allocated_bytes += max(0, grown)
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)

    def _forget(self, address: int, _: object) -> None:
        self._live_bytes -= self._live.pop(address)[1]


def _tensors(values: Any) -> list[Tensor]:
    """Tensors in nested arguments or results; sparse ones have no single storage."""
    found = (each for each in tree_leaves(values) if isinstance(each, Tensor))
    return [tensor for tensor in found if tensor.layout is torch.strided]


def _flops(
    func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
) -> int:
    if name in OTHER_FLOPS:
        return OTHER_FLOPS[name](*args)
    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else formula(*args, **kwargs, out_val=result)


def _place() -> str:
    """The innermost running function of kernels or engine."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(("fusedacl.kernels", "fusedacl.engine")):
            # Python 3.11 runs comprehensions in a frame of their own, newer versions do not.
            function = frame.f_code.co_qualname.partition(".<locals>.<")[0]
            return f"{module.removeprefix('fusedacl.')}.{function}"
        frame = frame.f_back  # type: ignore[assignment]
    return "the call"


@contextlib.contextmanager
def _launches() -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    """Record the launches inside the block instead of running them.

    A launch is a kernel with its grid, and the key under which Triton would cache its binary.
    """
    found: list[tuple[str, tuple[Any, ...]]] = []
    try:
        from triton.runtime.interpreter import InterpretedFunction
    except ImportError:
        yield found
        return

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        size = grid(named) if callable(grid) else grid
        programs = "x".join(str(int(number)) for number in size)
        found.append((f"{kernel.fn.__name__} [{programs}]", _binary(kernel, named)))

    with mock.patch.object(InterpretedFunction, "run", run):
        yield found


def _binary(kernel: Any, named: Mapping[str, Any]) -> tuple[Any, ...]:
    unspecialized = kernel.kwargs.get("do_not_specialize") or ()
    types = kernel.fn.__annotations__
    key: list[Any] = [kernel.fn.__module__, kernel.fn.__name__]
    for name, value in sorted(named.items()):
        # Launch options such as num_warps are not arguments of the kernel.
        if name in kernel.arg_names and "constexpr" not in str(types.get(name)):
            value = _kind(value, name in unspecialized)
        key.append((name, value))
    return tuple(key)


def _kind(value: Any, unspecialized: bool) -> Any:
    """Properties that Triton specialises on: dtype, 16-byte alignment, 1, multiples of 16."""
    if isinstance(value, Tensor):
        return str(value.dtype), value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        width = 32 if -(2**31) <= value < 2**31 else 64
        return width if unspecialized else (width, value == 1, value % 16 == 0)
    return type(value).__name__
