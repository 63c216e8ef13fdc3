"""The columns of each program of a sum over pairs, so that all multiprocessors end together."""

from __future__ import annotations

import functools

import torch
import triton

from .tiles import Tile

# A multiprocessor needs this number of programs to hide their waiting.
PROGRAMS_PER_MULTIPROCESSOR = 2
# Time of a program beside its blocks of columns, as a number of blocks (by a model): it loads its
# rows, and writes its sums or, in the backward pass, its part of the gradient.
BLOCKS_AROUND_SUMS, BLOCKS_AROUND_GRADIENT = 1, 3
# Limits of a split.
MAX_SPLITS = 32
MAX_PARTIAL_BYTES = 32 * 1024 * 1024


def split_columns(
    num_programs: int,
    num_columns: int,
    tile: Tile,
    partial_bytes: int,
    device: torch.device,
    blocks_around: int,
) -> tuple[int, int]:
    """Return the number of splits that keeps the GPU busy, and the blocks of columns in each.

    partial_bytes: size of the result, which every split writes separately. blocks_around: what a
    program does once, as a number of blocks.
    """
    num_blocks = max(1, triton.cdiv(num_columns, tile.columns))
    affordable = MAX_PARTIAL_BYTES // max(1, partial_bytes)
    most = max(1, min(affordable, MAX_SPLITS, num_blocks))
    multiprocessors = num_multiprocessors(device)
    return balanced_split(num_programs, num_blocks, most, multiprocessors, blocks_around)


@functools.cache
def balanced_split(
    num_programs: int, num_blocks: int, most: int, multiprocessors: int, blocks_around: int
) -> tuple[int, int]:
    """Return the split, into at most `most` parts, with which the last multiprocessor ends first.

    Programs that run on a multiprocessor at once share it, so that the one with most of them is the
    last: 128 programs on 108 multiprocessors keep them busy for 59 % of the time, 5 x 128 for 99 %.
    """

    def cost(num_splits: int) -> int:
        blocks = triton.cdiv(num_blocks, num_splits)
        launched = num_programs * triton.cdiv(num_blocks, blocks)
        load = max(PROGRAMS_PER_MULTIPROCESSOR, triton.cdiv(launched, multiprocessors))
        return load * (blocks + blocks_around)

    # The fewest of several that are equal.
    blocks_per_split = triton.cdiv(num_blocks, min(range(1, most + 1), key=cost))
    return triton.cdiv(num_blocks, blocks_per_split), blocks_per_split


def split_triangle(
    num_rows: int, num_exits: int, tile: Tile, device: torch.device
) -> tuple[int, int]:
    """Return what `split_columns` returns, where blocks of rows take the columns from theirs on."""
    return balanced_triangle(
        triton.cdiv(num_rows, tile.rows), num_exits, triton.cdiv(num_rows, tile.columns),
        tile.rows // tile.columns, num_multiprocessors(device),
    )  # fmt: skip


@functools.cache
def balanced_triangle(
    row_blocks: int,
    num_exits: int,
    num_blocks: int,
    blocks_per_row_block: int,
    multiprocessors: int,
) -> tuple[int, int]:
    """Return the split of the columns, and the blocks in each, with which a triangle ends first.

    Programs start as multiprocessors become free: Graham's bound of the time until the last ends.
    """

    def cost(num_splits: int) -> float:
        blocks = triton.cdiv(num_blocks, num_splits)
        in_all = 0
        for row_block in range(row_blocks):
            left = num_blocks - row_block * blocks_per_row_block
            in_all += left + BLOCKS_AROUND_SUMS * triton.cdiv(left, blocks)
        longest = PROGRAMS_PER_MULTIPROCESSOR * (blocks + BLOCKS_AROUND_SUMS)
        return (num_exits * in_all + (multiprocessors - 1) * longest) / multiprocessors

    blocks_per_split = triton.cdiv(num_blocks, min(range(1, MAX_SPLITS + 1), key=cost))
    return triton.cdiv(num_blocks, blocks_per_split), blocks_per_split


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        # The interpreter stands in for an A100.
        return 108
    return torch.cuda.get_device_properties(device).multi_processor_count
