"""What a call does, counted instead of timed: the same numbers on any machine.

A dispatch mode sees every operation that PyTorch runs in the calling thread, those of backward
passes too. Triton kernels are noted with their grids and not run, so that large grids cost nothing:
what they write is left as it was allocated.
"""

import contextlib
import gc
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# Every way by which PyTorch hands a tensor's value to Python ends in one of these, or the shape of
# a result depends on values, for which the host waits.
READS = frozenset(
    "_local_scalar_dense is_nonzero item nonzero masked_select _unique2 bincount equal".split()
)
# With a mask for an index the same.
INDEXING = frozenset(("index", "index_put", "index_put_"))
# On the CPU these leave no operation behind, where on a GPU they are a copy that is waited for.
SILENT_READS = ("tolist", "cpu", "numpy")
# Which arguments are multiplied: [.., m, k] and [.., k, n] or [k].
PRODUCTS = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "vdot"), (0, 1)),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), (1, 2)),
}
# Products in an attention: scores and values; backward again the scores, then four gradients.
ATTENTIONS = {
    "_scaled_dot_product_flash_attention_for_cpu": (0, 1, 2),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (1, 2, 5),
}


@dataclass(frozen=True)
class Counts:
    """What one call did.

    operations: PyTorch's, by name, without host reads and collectives.
    flops: of matrix products, two a multiplication and addition.
    allocated_bytes: of all results' storages; peak_bytes: the most of them at one time.
    host_reads: "place: how", each of which may wait for a device.
    passes: forward calls of what was watched.
    launches: of Triton kernels, with their grids; binaries: what a GPU would compile for them.
    collectives: by name.
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
        """As JSON has it, names in alphabetical order."""
        return {
            name: dict(sorted(value.items())) if isinstance(value, dict) else value
            for name, value in asdict(self).items()
        }


def count(
    call: Callable[[], object], watched: Mapping[str, Sequence[nn.Module]] | None = None
) -> tuple[Counts, Counter[str]]:
    """What a call does, and its operations by "place: name".

    The place is the function of this project from which an operation came.

    Args:
        watched: name -> modules whose forward calls are counted together.
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
        stack.enter_context(_no_garbage())
        with mode:
            call()
    found = Counts(
        operations=dict(mode.operations),
        flops=mode.flops,
        allocated_bytes=mode.allocated_bytes,
        peak_bytes=mode.peak_bytes,
        host_reads=dict(mode.host_reads),
        passes=dict(passes),
        launches=dict(Counter(launch.text for launch in launches)),
        binaries=len({launch.binary for launch in launches}),
        collectives=dict(mode.collectives),
    )
    return found, mode.places


def is_host_read(name: str, arguments: Sequence[Any]) -> bool:
    """Whether the host waits for the values of this operation (its name without "aten::")."""
    return name in READS or (
        name in INDEXING
        and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in arguments[1]
        )
    )


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.places: Counter[str] = Counter()
        self.host_reads: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()
        self.flops = self.allocated_bytes = self.peak_bytes = 0
        self._live_bytes = 0
        # Address of a storage -> the storage, and its bytes as last seen.
        self._live: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # In inference mode composite operations arrive whole, elsewhere in parts.
        if torch.is_inference_mode_enabled():
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        # A range for the profiler: nothing is computed.
        if name.startswith("profiler::"):
            return result
        self.places[f"{_place()}: {name}"] += 1
        self.flops += _flops(name, args)
        if name.startswith("c10d::"):
            self.collectives[name.removeprefix("c10d::")] += 1
        elif is_host_read(name, args):
            self.host_reads[f"{_place()}: {name}"] += 1
        else:
            self.operations[name] += 1
        # What `torch.tensor` has made arrives here for the first time.
        inputs = () if name == "lift_fresh" else (*args, *kwargs.values())
        self._note_storages(result, inputs)
        return result

    def noted(self, read: str) -> Callable[..., Any]:
        """A method of Tensor that is counted as a host read."""
        method = getattr(Tensor, read)

        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.host_reads[f"{_place()}: {read}"] += 1
            return method(tensor, *args, **kwargs)

        return call

    def _note_storages(self, result: Any, inputs: Any) -> None:
        before = {tensor.untyped_storage()._cdata for tensor in _tensors(inputs)}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            address, size = storage._cdata, storage.nbytes()
            known = self._live.get(address)
            if known is None and address in before:
                continue
            if known is None:
                reference = weakref.ref(storage, partial(self._forget, address))
            else:
                reference = known[0]
            grown = size - (0 if known is None else known[1])
            self._live[address] = reference, size
            self._live_bytes += grown
            self.allocated_bytes += max(0, grown)
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)

    def _forget(self, address: int, _: object) -> None:
        self._live_bytes -= self._live.pop(address)[1]


def _tensors(values: Any) -> Iterator[Tensor]:
    """Those in arguments or results of an operation: tensors, or lists of them."""
    if isinstance(values, Tensor):
        # A sparse tensor has no storage of its own.
        if values.layout is torch.strided:
            yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


def _flops(name: str, args: Sequence[Any]) -> int:
    if name in PRODUCTS:
        left, right = (args[place] for place in PRODUCTS[name])
        return 2 * left.numel() * (right.shape[-1] if right.dim() > 1 else 1)
    if name in ATTENTIONS:
        query_place, key_place, num_products = ATTENTIONS[name]
        # [.., T, d] and [.., S, d]
        return 2 * num_products * args[query_place].numel() * args[key_place].shape[-2]
    return 0


def _place() -> str:
    """The innermost function of this project that is being run, but for the benchmarks'."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(("fusedacl.kernels", "fusedacl.engine")):
            # Without comprehensions, which some versions of Python run in a frame of their own.
            function = frame.f_code.co_qualname.partition(".<locals>.<")[0]
            return f"{module.removeprefix('fusedacl.')}.{function}"
        frame = frame.f_back  # type: ignore[assignment]
    return "the call"


@contextlib.contextmanager
def _no_garbage() -> Iterator[None]:
    """Storages are freed when the last reference goes, and at no other time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(frozen=True)
class _Launch:
    """A kernel with its grid, and what makes Triton compile another binary of it."""

    text: str
    binary: tuple[Any, ...]


@contextlib.contextmanager
def _launches() -> Iterator[list[_Launch]]:
    """The launches within the block, which are noted and not done."""
    found: list[_Launch] = []
    try:
        from triton.runtime.interpreter import InterpretedFunction
    except ImportError:
        yield found
        return

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        size = grid(named) if callable(grid) else grid
        programs = "x".join(str(int(number)) for number in size)
        found.append(_Launch(f"{kernel.fn.__name__} [{programs}]", _binary(kernel, named)))

    with mock.patch.object(InterpretedFunction, "run", run):
        yield found


def _binary(kernel: Any, named: Mapping[str, Any]) -> tuple[Any, ...]:
    unspecialized = kernel.kwargs.get("do_not_specialize") or ()
    types = kernel.fn.__annotations__
    key: list[Any] = [kernel.fn.__module__, kernel.fn.__name__]
    for name, value in sorted(named.items()):
        # Options of a launch, such as num_warps, are no arguments of the kernel.
        if name in kernel.arg_names and "constexpr" not in str(types.get(name)):
            value = _kind(value, name in unspecialized)
        key.append((name, value))
    return tuple(key)


def _kind(value: Any, unspecialized: bool) -> Any:
    """As Triton tells arguments apart: dtypes, 16-byte alignment, the number 1, multiples of 16."""
    if isinstance(value, Tensor):
        return str(value.dtype), value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        width = 32 if -(2**31) <= value < 2**31 else 64
        return width if unspecialized else (width, value == 1, value % 16 == 0)
    return type(value).__name__
