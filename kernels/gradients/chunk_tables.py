"""Tables in device memory that assign a chunk of a tensor to every GPU program."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .reference import Gradients

# Elements per program. BERT-base (110M elements) gives 6700 programs, many waves on any GPU.
CHUNK = 16384

# Number of layouts (shapes, dtypes and groups) that are kept, and of address tables per layout.
MAX_LAYOUTS = 8
MAX_ADDRESSES = 8

ABSENT = tl.constexpr(0)
FLOAT16 = tl.constexpr(1)
BFLOAT16 = tl.constexpr(2)
FLOAT32 = tl.constexpr(3)
NUM_CODES = tl.constexpr(4)
DTYPES = (None, torch.float16, torch.bfloat16, torch.float32)
CODES = {
    (left, right): len(DTYPES) * left_code + right_code
    for left_code, left in enumerate(DTYPES)
    for right_code, right in enumerate(DTYPES)
}


class Lists(NamedTuple):
    """Two lists of gradients as the tables need them: a value (two addresses) per entry."""

    sizes: tuple[int, ...]
    codes: tuple[int, ...]
    addresses: tuple[int, ...]
    # Index, and the tensors read instead of a and b; a copy must live until the launch.
    stand_ins: list[tuple[int, Tensor | None, Tensor | None]]


def read_lists(a: Gradients, b: Gradients) -> Lists:
    sizes, codes = [], []
    addresses: list[int] = []
    stand_ins = []
    for index, (x, y) in enumerate(zip(a, b, strict=True)):
        # There are hundreds of entries per step, so the usual case comes first and is short.
        if x is not None and y is not None and x.is_contiguous() and y.is_contiguous():
            sizes.append(x.numel())
            codes.append(CODES[x.dtype, y.dtype])
            addresses += x.data_ptr(), y.data_ptr()
            continue
        pair = in_one_order(x, y)
        stand_ins.append((index, *pair))
        sizes.append(next((t.numel() for t in pair if t is not None), 0))
        left_dtype, right_dtype = (None if t is None else t.dtype for t in pair)
        codes.append(CODES[left_dtype, right_dtype])
        addresses += (0 if t is None else t.data_ptr() for t in pair)
    return Lists(tuple(sizes), tuple(codes), tuple(addresses), stand_ins)


def in_one_order(left: Tensor | None, right: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return both tensors dense and in the same memory order, as copies where necessary."""
    left, right = (
        t if t is None or is_dense(t) else t.detach().contiguous() for t in (left, right)
    )
    if left is not None and right is not None and left.stride() != right.stride():
        # `empty_like` keeps the strides of a dense tensor.
        right = torch.empty_like(left, dtype=right.dtype).copy_(right.detach())
    return left, right


def is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill their memory, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


class Layout:
    """Tables on the device for lists of certain sizes, dtypes and groups, without the gradients.

    chunks: int32 [2, num_chunks], entry and number within the entry; sorted by group, then entry.
    entries: int64 [3, n], size, dtype codes and group.
    group_starts: int32 [G + 1], the first chunk of each group.
    """

    def __init__(
        self, lists: Lists, groups: Sequence[int] | None, num_groups: int, device: torch.device
    ) -> None:
        sizes, codes, of_entry = (
            torch.tensor(column, dtype=torch.int64, device="cpu")
            for column in (lists.sizes, lists.codes, groups or [0] * len(lists.sizes))
        )
        num_chunks = (sizes + CHUNK - 1) // CHUNK
        order = of_entry.argsort(stable=True)
        counts = num_chunks[order]
        entry = order.repeat_interleave(counts)
        first = (counts.cumsum(0) - counts).repeat_interleave(counts)
        number = torch.arange(len(entry), device="cpu") - first
        group_starts = torch.zeros(num_groups + 1, dtype=torch.int64, device="cpu")
        group_starts.index_add_(0, of_entry + 1, num_chunks)
        self.device = device
        self.num_chunks, self.num_entries = len(entry), len(sizes)
        self.chunks = self.upload(torch.stack([entry, number]).int())
        self.entries = self.upload(torch.stack([sizes, codes, of_entry]))
        self.group_starts = self.upload(group_starts.cumsum(0).int())
        self.address_tables: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()
        self.spares: list[Tensor] = []

    def upload(self, table: Tensor, staging: Tensor | None = None) -> Tensor:
        """Return the table on the device, without waiting for the copy from pinned memory."""
        if self.device.type != "cuda":
            return table
        if staging is None:
            staging = torch.empty_like(table, pin_memory=True)
        return staging.copy_(table).to(self.device, non_blocking=True)

    def find_addresses(self, addresses: tuple[int, ...], capturing: bool) -> Tensor:
        """Return a table int64 [n, 2]; never written again, as a CUDA graph may read it."""
        table = self.address_tables.get(addresses)
        if table is None:
            on_host = torch.tensor(addresses, dtype=torch.int64, device="cpu")
            if capturing:
                # Before torch 2.8 no memory can be pinned then. The copy becomes part of the graph,
                # so its source is kept, and the table is empty until a replay.
                staging = self.spares.pop() if self.spares else on_host.pin_memory()
                table = self.upload(on_host, staging)
                for_graphs.append(staging)
            else:
                table = self.upload(on_host)
                keep(self.address_tables, addresses, table, MAX_ADDRESSES)
        if self.device.type == "cuda" and not capturing:
            # For both calls of a step.
            while len(self.spares) < 2:
                self.spares.append(torch.empty_like(table, device="cpu", pin_memory=True))
        return table


def keep(cache: OrderedDict[Any, Any], key: Any, value: Any, size: int) -> None:
    """Store a value as the newest of at most `size`."""
    cache[key] = value
    cache.move_to_end(key)
    while len(cache) > size:
        cache.popitem(last=False)


layouts: OrderedDict[tuple[Any, ...], Layout] = OrderedDict()
# Memory that captured graphs read; kept forever, because nothing tells when a graph is deleted.
for_graphs: list[Any] = []
lock = threading.Lock()


def find_tables(
    lists: Lists, groups: Sequence[int] | None, num_groups: int, device: torch.device
) -> tuple[Layout, Tensor]:
    """Return the layout and the address table of these lists for the current stream.

    RuntimeError: a CUDA graph is being captured and such lists are new.
    """
    capturing, stream = False, 0
    if device.type == "cuda":
        capturing = torch.cuda.is_current_stream_capturing()
        stream = torch.cuda.current_stream(device).cuda_stream
    of_entries = None if groups is None else tuple(groups)
    lists_key = (lists.sizes, lists.codes, of_entries, num_groups, device)
    key = (stream, lists_key)
    with lock:
        if capturing:
            # A capture starts on an idle device, so tables made on any stream are complete.
            key = next((found for found in layouts if found[1] == lists_key), key)
        layout = layouts.get(key)
        if layout is None and capturing:
            raise RuntimeError(
                "gradients of these shapes, dtypes and groups are new while a CUDA graph is being "
                "captured: run the step once before the capture"
            )
        if layout is None:
            layout = Layout(lists, groups, num_groups, device)
        keep(layouts, key, layout, MAX_LAYOUTS)
        table = layout.find_addresses(lists.addresses, capturing)
        if capturing:
            for_graphs.append((layout, table))
    return layout, table
