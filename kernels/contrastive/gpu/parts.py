"""Reading the rows of a batch from its four tensors, wherever and in whatever dtype they are."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

# The tensors by their names in kernels, with the strides that each has.
STRIDES = {
    "samples": ("exit", "row", "column"),
    "label_rows": ("exit", "row", "column"),
    "teacher": ("row", "column"),
    "teacher_label_rows": ("row", "column"),
}
STRIDE_NAMES = [f"{part}_{stride}_stride" for part, names in STRIDES.items() for stride in names]


@triton.jit
def load_part(part, rows, columns, wanted):
    """Return x [R, C] float32 of one tensor, 0 where it is not wanted."""
    start, row_stride, column_stride = part
    row_offsets = rows.to(tl.int64)[:, None] * row_stride
    column_offsets = columns.to(tl.int64)[None, :] * column_stride
    return tl.load(start + row_offsets + column_offsets, mask=wanted, other=0.0).to(tl.float32)


@triton.jit
def gather(
    rows, exists, columns, sizes, parts, HAS_LABELS: tl.constexpr, HAS_TEACHER: tl.constexpr
):
    """Return x [R, C] float32; 0 for a row that does not exist, so that its NaN has no effect.

    sizes: number of samples, of label embeddings, of rows, and width.
    parts: (address, row stride, column stride) of each of the four tensors.
    """
    num_samples, num_labels, _, width = sizes
    wanted = exists[:, None] & (columns < width)[None, :]
    x = load_part(parts[0], rows, columns, wanted & (rows < num_samples)[:, None])
    if HAS_LABELS:
        position = rows - num_samples
        here = (position >= 0) & (position < num_labels)
        x += load_part(parts[1], position, columns, wanted & here[:, None])
    if HAS_TEACHER:
        position = rows - num_samples - num_labels
        here = (position >= 0) & (position < num_samples)
        x += load_part(parts[2], position, columns, wanted & here[:, None])
        position -= num_samples
        x += load_part(parts[3], position, columns, wanted & (position >= 0)[:, None])
    return x


def part_arguments(parts: list[Tensor]) -> list[Any]:
    """Return address and strides of each of the four tensors; of the samples for an absent one."""
    arguments: list[Any] = []
    for index, strides in enumerate(STRIDES.values()):
        part = parts[index] if index < len(parts) else parts[0]
        arguments.append(part)
        if "exit" in strides:
            arguments.append(part.stride(0) if part.dim() == 3 else 0)
        arguments += part.stride()[-2:]
    return arguments


def part_types(dtype: str) -> dict[str, str]:
    """Return Triton's types of the four tensors, all in one dtype."""
    return dict.fromkeys(STRIDES, f"*{dtype}")
