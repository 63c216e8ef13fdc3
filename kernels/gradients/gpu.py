"""The gradient check on a GPU: any number of tensors in one launch, each read once.

    stats_g = (a . b, |a|^2, |b|^2)                               over the entries of group g
    l'_g    = weight if angle(stats_g) <= max_angle else 0        NaN if the stats are not finite
    a      <- factor ((1 - l'_g) a + l'_g b)
    factor  = scale min(1, max_norm / (|scale| |g| + 1e-6))
    |g|^2   = sum_g (1 - l'_g)^2 |a|^2 + 2 l'_g (1 - l'_g) a . b + l'_g^2 |b|^2
                                                                  or of each group alone

The lists are divided into chunks of CHUNK elements, one per program, which finds it in tables in
device memory: one for shapes, dtypes and groups, made once, and one for the addresses.

A lane adds CHUNK / BLOCK products in float32, a tree the lanes, and float64 sums the chunks of a
group. The order of all sums depends only on sizes and groups: the same values give the same bits.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..support.variant import Variant, make_variant
from . import chunk_tables
from .chunk_tables import ABSENT, BFLOAT16, DTYPES, FLOAT32, NUM_CODES, find_tables, read_lists
from .reference import Gate, Gradients, device_of

# Loaded at a time: 8 elements per thread are one 128-bit load of float16, two of float32.
BLOCK = 1024
NUM_WARPS = 4
# Groups that a program decides at a time, one per thread.
GROUP_BLOCK = 128
# Partial sums that a program of the second stage adds at a time.
PARTIAL_BLOCK = 1024
PARTIAL_WARPS = 8


@triton.jit
def locate(chunk, chunks, num_chunks, entries, addresses, num_entries, CHUNK: tl.constexpr):
    """Return both addresses and dtype codes, number of elements, group, and kind of access."""
    entry = tl.load(chunks + chunk)
    first = tl.load(chunks + num_chunks + chunk).to(tl.int64) * CHUNK
    size = tl.load(entries + entry)
    codes = tl.load(entries + num_entries + entry).to(tl.int32)
    group = tl.load(entries + 2 * num_entries + entry)
    left = tl.load(addresses + 2 * entry)
    right = tl.load(addresses + 2 * entry + 1)
    left_code = codes // NUM_CODES
    right_code = codes % NUM_CODES
    # Chunks start at multiples of 16 bytes from the base.
    aligned = (left | right) % 16 == 0
    left_wide = left_code == FLOAT32
    right_wide = right_code == FLOAT32
    left += first * tl.where(left_wide, 4, 2)
    right += first * tl.where(right_wide, 4, 2)
    count = tl.minimum(size - first, CHUNK).to(tl.int32)
    access = 4 * left_wide.to(tl.int32) + 2 * right_wide.to(tl.int32) + aligned.to(tl.int32)
    return left, left_code, right, right_code, count, group, access


@triton.jit
def pointer_to(address, WIDE: tl.constexpr, ALIGNED: tl.constexpr):
    if WIDE:
        pointer = address.to(tl.pointer_type(tl.float32))
    else:
        pointer = address.to(tl.pointer_type(tl.int16))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load(address, code, offsets, mask, WIDE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return x [BLOCK] float32, 0 outside the mask."""
    x = tl.load(pointer_to(address, WIDE, ALIGNED) + offsets, mask=mask, other=0)
    if not WIDE:
        # A bfloat16 is the upper half of a float32: sm_70 and 75 need no conversion instruction.
        bfloat16 = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        float16 = x.to(tl.float16, bitcast=True).to(tl.float32)
        x = tl.where(code == BFLOAT16, bfloat16, float16)
    return x


@triton.jit
def store(address, code, offsets, x, mask, WIDE: tl.constexpr, ALIGNED: tl.constexpr):
    if not WIDE:
        bfloat16 = x.to(tl.bfloat16).to(tl.int16, bitcast=True)
        float16 = x.to(tl.float16).to(tl.int16, bitcast=True)
        x = tl.where(code == BFLOAT16, bfloat16, float16)
    tl.store(pointer_to(address, WIDE, ALIGNED) + offsets, x, mask=mask)


@triton.jit
def lane_sums(
    left, left_code, right, right_code, count,
    BLOCK: tl.constexpr, LEFT_WIDE: tl.constexpr, RIGHT_WIDE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Return x . y, |x|^2 and |y|^2 of every BLOCK-th element, each [BLOCK] float32."""
    dot = tl.zeros([BLOCK], tl.float32)
    left_squared = tl.zeros([BLOCK], tl.float32)
    right_squared = tl.zeros([BLOCK], tl.float32)
    offsets = tl.arange(0, BLOCK)
    whole = count // BLOCK * BLOCK
    # A mask that is the same for the whole block keeps 128-bit loads.
    for start in range(0, whole, BLOCK):
        here = start + offsets
        x = load(left, left_code, here, left_code != ABSENT, LEFT_WIDE, ALIGNED)
        y = load(right, right_code, here, right_code != ABSENT, RIGHT_WIDE, ALIGNED)
        dot = tl.fma(x, y, dot)
        left_squared = tl.fma(x, x, left_squared)
        right_squared = tl.fma(y, y, right_squared)
    if whole < count:
        here = whole + offsets
        left_count = tl.where(left_code != ABSENT, count, 0)
        right_count = tl.where(right_code != ABSENT, count, 0)
        x = load(left, left_code, here, here < left_count, LEFT_WIDE, False)
        y = load(right, right_code, here, here < right_count, RIGHT_WIDE, False)
        dot = tl.fma(x, y, dot)
        left_squared = tl.fma(x, x, left_squared)
        right_squared = tl.fma(y, y, right_squared)
    return dot, left_squared, right_squared


@triton.jit(do_not_specialize=["num_chunks", "num_entries"])
def chunk_sums_kernel(
    chunks, entries, addresses,
    # Written: [3, num_chunks] float32.
    partials, num_chunks, num_entries,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: chunks."""
    chunk = tl.program_id(0)
    left, left_code, right, right_code, count, _, access = locate(
        chunk, chunks, num_chunks, entries, addresses, num_entries, CHUNK
    )
    dot = tl.zeros([BLOCK], tl.float32)
    left_squared = tl.zeros([BLOCK], tl.float32)
    right_squared = tl.zeros([BLOCK], tl.float32)
    for ACCESS in tl.static_range(8):
        if access == ACCESS:
            dot, left_squared, right_squared = lane_sums(
                left, left_code, right, right_code, count,
                BLOCK, ACCESS // 4 == 1, ACCESS // 2 % 2 == 1, ACCESS % 2 == 1,
            )  # fmt: skip
    # Outside the loop the tree is the same for every alignment, and so is the last bit.
    tl.store(partials + chunk, tl.sum(dot, 0))
    tl.store(partials + num_chunks + chunk, tl.sum(left_squared, 0))
    tl.store(partials + 2 * num_chunks + chunk, tl.sum(right_squared, 0))


@triton.jit(do_not_specialize=["num_chunks"])
def group_sums_kernel(
    partials, group_starts,
    # Written: [G, 3] float32.
    stats, num_chunks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: groups x the three sums; a group without chunks has zeros."""
    group = tl.program_id(0)
    column = tl.program_id(1)
    start = tl.load(group_starts + group)
    stop = tl.load(group_starts + group + 1)
    partials += column * num_chunks
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(start, stop, BLOCK):
        chunk = first + tl.arange(0, BLOCK)
        total += tl.load(partials + chunk, mask=chunk < stop, other=0.0).to(tl.float64)
    tl.store(stats + 3 * group + column, tl.sum(total, 0).to(tl.float32))


@triton.jit
def load_stats(stats, group, mask):
    stats += 3 * group
    dot = tl.load(stats, mask=mask, other=0.0).to(tl.float64)
    left_squared = tl.load(stats + 1, mask=mask, other=0.0).to(tl.float64)
    right_squared = tl.load(stats + 2, mask=mask, other=0.0).to(tl.float64)
    return dot, left_squared, right_squared


@triton.jit
def decide(dot, left_squared, right_squared, lowest_cosine, weight):
    """Return l', float64; NaN where the stats are not finite."""
    product = tl.sqrt(left_squared) * tl.sqrt(right_squared)
    is_zero = product == 0.0
    cosine = tl.where(is_zero, 0.0, dot / tl.where(is_zero, 1.0, product))
    # Rounding may give a cosine below -1, and at 180 degrees all gradients agree.
    cosine = tl.where(cosine < -1.0, -1.0, cosine)
    used = tl.where(cosine >= lowest_cosine, weight, 0.0).to(tl.float64)
    finite = tl.abs(dot) + left_squared + right_squared < float("inf")
    return tl.where(finite, used, float("nan"))


@triton.jit
def combined_squared_norm(dot, left_squared, right_squared, used):
    """Return |(1 - l') a + l' b|^2, float64."""
    kept = 1.0 - used
    squared = kept * kept * left_squared + 2.0 * used * kept * dot + used * used * right_squared
    return tl.where(squared < 0.0, 0.0, squared)


@triton.jit
def clipped(factor, squared_norm, max_norm):
    """Return the factor that gives a norm of at most `max_norm`; NaN for a norm of NaN."""
    ratio = max_norm / (tl.sqrt(squared_norm) * tl.abs(factor) + 1e-6)
    return factor * tl.where(ratio > 1.0, 1.0, ratio)


@triton.jit
def combine_chunk(
    left, left_code, right, right_code, count, kept, taken,
    BLOCK: tl.constexpr, LEFT_WIDE: tl.constexpr, RIGHT_WIDE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Set x to kept x + taken y; y is not read where it does not count."""
    # The compiler gives all blocks of one shape the layout of the narrowest dtype. With a shape of
    # its own float32 gets 128 bits per thread, and is stored without passing through shared memory.
    NUM_ROWS: tl.constexpr = (4 if RIGHT_WIDE else 2) if LEFT_WIDE else 1
    WIDTH: tl.constexpr = BLOCK // NUM_ROWS
    offsets = tl.arange(0, NUM_ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    reads_right = (right_code != ABSENT) & (taken != 0.0)
    whole = count // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        here = start + offsets
        x = load(left, left_code, here, left_code != ABSENT, LEFT_WIDE, ALIGNED)
        y = load(right, right_code, here, reads_right, RIGHT_WIDE, ALIGNED)
        combined = tl.fma(x, kept, y * taken)
        store(left, left_code, here, combined, left_code != ABSENT, LEFT_WIDE, ALIGNED)
    if whole < count:
        here = whole + offsets
        left_count = tl.where(left_code != ABSENT, count, 0)
        right_count = tl.where(reads_right, count, 0)
        x = load(left, left_code, here, here < left_count, LEFT_WIDE, False)
        y = load(right, right_code, here, here < right_count, RIGHT_WIDE, False)
        combined = tl.fma(x, kept, y * taken)
        store(left, left_code, here, combined, here < left_count, LEFT_WIDE, False)


@triton.jit(do_not_specialize=["lowest_cosine", "num_chunks", "num_entries", "num_groups"])
def gated_combine_kernel(
    chunks, entries, addresses, stats,
    # Written: [G] float32, the l' used.
    used_weights,
    # A number, or the address of a float32 where SCALE_IN_MEMORY.
    scale, weight, max_norm,
    # The bits of a float64, for a launch has no float64 arguments.
    lowest_cosine, num_chunks, num_entries, num_groups,
    SCALE_IN_MEMORY: tl.constexpr,
    # "none", "all" groups by their common norm, or "each" by its own.
    CLIP: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, GROUP_BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: chunks, at least 1; the first program also writes l'."""
    chunk = tl.program_id(0)
    lowest_cosine = lowest_cosine.to(tl.float64, bitcast=True)
    factor = tl.full([], 1.0, tl.float64)
    if SCALE_IN_MEMORY:
        factor *= tl.load(scale).to(tl.float64)
    else:
        factor *= scale

    num_written = tl.where(chunk == 0, num_groups, 0)
    num_decided = num_groups
    if CLIP != "all":
        num_decided = num_written
    squared_norms = tl.zeros([GROUP_BLOCK], tl.float64)
    for first in range(0, num_decided, GROUP_BLOCK):
        groups = first + tl.arange(0, GROUP_BLOCK)
        dot, left_squared, right_squared = load_stats(stats, groups, groups < num_groups)
        used = decide(dot, left_squared, right_squared, lowest_cosine, weight)
        tl.store(used_weights + groups, used.to(tl.float32), mask=groups < num_written)
        squared_norms += combined_squared_norm(dot, left_squared, right_squared, used)
    if CLIP == "all":
        factor = clipped(factor, tl.sum(squared_norms, 0), max_norm)

    if chunk < num_chunks:
        left, left_code, right, right_code, count, group, access = locate(
            chunk, chunks, num_chunks, entries, addresses, num_entries, CHUNK
        )
        dot, left_squared, right_squared = load_stats(stats, group, group >= 0)
        used = decide(dot, left_squared, right_squared, lowest_cosine, weight)
        if CLIP == "each":
            squared_norm = combined_squared_norm(dot, left_squared, right_squared, used)
            factor = clipped(factor, squared_norm, max_norm)
        kept = ((1.0 - used) * factor).to(tl.float32)
        taken = (used * factor).to(tl.float32)
        # No l' or no factor, both NaN, and the gradient stays; so it does where nothing changes.
        changes = (kept == kept) & (taken == taken) & ((kept != 1.0) | (taken != 0.0))
        count = tl.where(changes, count, 0)
        for ACCESS in tl.static_range(8):
            if access == ACCESS:
                combine_chunk(
                    left, left_code, right, right_code, count, kept, taken,
                    BLOCK, ACCESS // 4 == 1, ACCESS // 2 % 2 == 1, ACCESS % 2 == 1,
                )  # fmt: skip


def grad_dot_norm(
    a: Gradients, b: Gradients, groups: Sequence[int] | None, num_groups: int
) -> Tensor:
    """Return the [G, 3] of `angle.grad_dot_norm`, whose arguments are already checked."""
    lists = read_lists(a, b)
    stats = torch.empty(num_groups, 3, dtype=torch.float32, device=device_of(a, b))
    with torch.cuda.device_of(stats):
        layout, addresses = find_tables(lists, groups, num_groups, stats.device)
        num_chunks = layout.num_chunks
        partials = torch.empty(3, num_chunks, dtype=torch.float32, device=stats.device)
        if num_chunks > 0:
            chunk_sums_kernel[(num_chunks,)](
                layout.chunks, layout.entries, addresses, partials, num_chunks, layout.num_entries,
                CHUNK=chunk_tables.CHUNK, BLOCK=BLOCK, num_warps=NUM_WARPS,
            )  # fmt: skip
        group_sums_kernel[(num_groups, 3)](
            partials, layout.group_starts, stats, num_chunks,
            BLOCK=PARTIAL_BLOCK, num_warps=PARTIAL_WARPS,
        )  # fmt: skip
    return stats


def gated_combine_(
    a: Gradients,
    b: Gradients,
    stats: Tensor,
    gate: Gate,
    groups: Sequence[int] | None,
    num_groups: int,
) -> Tensor:
    """Return the l' [G] of `angle.gated_combine_`, whose arguments are already checked."""
    lists = read_lists(a, b)
    scale = 1 if gate.scale is None else gate.scale
    if isinstance(scale, Tensor) and scale.device.type == "cpu" and stats.device.type != "cpu":
        scale = scale.item()
    max_norm, clip = gate.max_norm, "each" if gate.clip_groups else "all"
    if max_norm is None:
        max_norm, clip = 0, "none"
    used = torch.empty(num_groups, dtype=torch.float32, device=stats.device)
    with torch.cuda.device_of(used):
        layout, addresses = find_tables(lists, groups, num_groups, used.device)
        gated_combine_kernel[(max(1, layout.num_chunks),)](
            layout.chunks, layout.entries, addresses, stats.contiguous(), used,
            scale.float() if isinstance(scale, Tensor) else float32(scale),
            float32(gate.weight), float32(max_norm), lowest_cosine_bits(gate.max_angle),
            layout.num_chunks, layout.num_entries, num_groups,
            SCALE_IN_MEMORY=isinstance(scale, Tensor), CLIP=clip,
            CHUNK=chunk_tables.CHUNK, BLOCK=BLOCK, GROUP_BLOCK=GROUP_BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
    # Autograd does not notice what a kernel writes.
    torch.autograd.graph.increment_version([left for left in a if left is not None])
    with torch.no_grad():
        for index, stand_in, _ in lists.stand_ins:
            original = a[index]
            if original is not None and stand_in is not None and stand_in is not original:
                original.copy_(stand_in)
    return used


def float32(number: float) -> float:
    """Round as the launch does; infinity beyond the largest number, where the launch would fail."""
    return ctypes.c_float(number).value


@functools.lru_cache(maxsize=64)
def lowest_cosine_bits(max_angle: float) -> int:
    """Return the smallest float64 cosine within the angle, as an integer with the same bits.

    Angles are rounded as in `angle._angle`, where some cosines below 0 are still 90 degrees.
    """
    # The angle of `below` is too large, unless no angle is; that of `lowest` never is.
    below, lowest = -1.0, -1.0 if max_angle >= 180 else 1.0
    while below < (middle := (below + lowest) / 2) < lowest:
        cosine = torch.tensor(middle, dtype=torch.float64, device="cpu")
        if torch.rad2deg(torch.acos(cosine)) <= max_angle:
            lowest = middle
        else:
            below = middle
    return int(struct.unpack("<q", struct.pack("<d", lowest))[0])


def obstacle(a: Gradients, b: Gradients) -> str | None:
    """Return why this kernel cannot take these lists, or None."""
    dtypes = {None if t is None else t.dtype for gradients in (a, b) for t in gradients}
    if dtypes.issubset(DTYPES):
        return None
    other = min(map(str, dtypes.difference(DTYPES)))
    return (
        f"a gradient is {other}, and this kernel takes float16, bfloat16 and float32 "
        "(impl='reference' takes any)"
    )


def variants(capability: int) -> list[Variant]:
    """List the shipped compilations, the same on every GPU; all read every dtype and alignment."""
    types = {
        "chunks": "*i32", "entries": "*i64", "addresses": "*i64", "group_starts": "*i32",
        "partials": "*fp32", "stats": "*fp32", "used_weights": "*fp32",
        "weight": "fp32", "max_norm": "fp32", "lowest_cosine": "i64",
    }  # fmt: skip
    sizes = {"CHUNK": chunk_tables.CHUNK, "BLOCK": BLOCK}
    of_groups = {"BLOCK": PARTIAL_BLOCK}
    found = [
        make_variant("chunk_sums", chunk_sums_kernel, sizes, types, num_warps=NUM_WARPS),
        make_variant("group_sums", group_sums_kernel, of_groups, types, num_warps=PARTIAL_WARPS),
    ]
    for in_memory, clip in itertools.product((False, True), ("none", "all", "each")):
        place, scale = ("in memory", "*fp32") if in_memory else ("a number", "fp32")
        constants = {"SCALE_IN_MEMORY": in_memory, "CLIP": clip, "GROUP_BLOCK": GROUP_BLOCK}
        found.append(
            make_variant(
                f"gated_combine, scale {place}, clip {clip}", gated_combine_kernel,
                {**constants, **sizes}, {**types, "scale": scale}, num_warps=NUM_WARPS,
            )
        )  # fmt: skip
    return found
