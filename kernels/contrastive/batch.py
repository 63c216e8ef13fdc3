"""The M rows of a contrastive batch: samples, label embeddings, and their teacher counterparts.

Row order everywhere: samples, label embeddings, teacher samples, teacher label embeddings. The
teacher rows are constants, so the rows that receive a gradient come first.
"""

import torch
from torch import Tensor

# A vector this short has no direction: it normalises to zero and its gradient is zero.
ZERO_NORM = 1e-12


def accumulate_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype of the computation: float64 if an input is float64, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def parts_in_order(
    embeddings: Tensor,
    label_embeddings: Tensor | None,
    teacher_embeddings: Tensor | None,
    teacher_label_embeddings: Tensor | None,
) -> list[Tensor]:
    """The parts that are present, in row order, [n, d] or [E, n, d]; no part is copied."""
    parts = [embeddings] if label_embeddings is None else [embeddings, label_embeddings]
    if teacher_embeddings is not None and teacher_label_embeddings is not None:
        leading = embeddings.shape[:-2]
        parts.append(teacher_embeddings.expand(*leading, -1, -1))
        parts.append(teacher_label_embeddings.expand(*leading, -1, -1))
    return parts


def compute_classes(
    labels: Tensor, num_labels: int | None, ignore_index: int, num_copies: int
) -> tuple[Tensor, bool]:
    """Class ids [M] of all rows from the samples' labels [N], and whether rows may be ignored.

    There are C classes; an ignored row has the id C. With `num_labels` = K, C = K and the ids are
    the labels, followed by the label embeddings' own 0..K-1. Without (None), labels are any
    integers, C = N, and equal labels share an id. `num_copies` is 2 when teacher rows repeat the
    student's.

    Raises:
        ValueError: a label outside [0, K). Looked for on the CPU only: elsewhere the look would
            wait for the device.
    """
    labels = labels.long()
    may_ignore = True
    if labels.device.type == "cpu" and labels.numel() > 0:
        smallest, largest = (int(bound) for bound in labels.aminmax())
        may_ignore = smallest <= ignore_index <= largest
        if num_labels is not None and (smallest < 0 or largest >= num_labels):
            check_range(labels, num_labels, ignore_index)
    if num_labels is None:
        # The id is the position of the first equal label in sorted order.
        classes = torch.searchsorted(labels.sort().values, labels)
        parts = [classes]
    else:
        parts = [labels, torch.arange(num_labels, device=labels.device)]
    if may_ignore:
        num_classes = labels.shape[0] if num_labels is None else num_labels
        parts[0] = parts[0].masked_fill(labels == ignore_index, num_classes)
    parts *= num_copies
    return (torch.cat(parts) if len(parts) > 1 else parts[0]), may_ignore


def check_range(labels: Tensor, num_labels: int, ignore_index: int) -> None:
    """Raises ValueError for the first label that is neither in [0, K) nor `ignore_index`."""
    outside = ((labels < 0) | (labels >= num_labels)) & (labels != ignore_index)
    if outside.any():
        raise ValueError(
            f"labels holds {int(labels[outside][0])}, but label_embeddings has K = {num_labels} "
            f"rows: a label must lie in [0, {num_labels}) or be ignore_index = {ignore_index}"
        )


# torch.compile cannot trace a look at the labels' values: for it they stay behind an operator.
@torch.library.custom_op("fusedacl::row_classes", mutates_args=())
def row_classes(
    labels: Tensor, num_labels: int | None, ignore_index: int, num_copies: int
) -> Tensor:
    """`compute_classes` as an operator."""
    classes, _ = compute_classes(labels, num_labels, ignore_index, num_copies)
    return classes


@row_classes.register_fake
def _(labels: Tensor, num_labels: int | None, ignore_index: int, num_copies: int) -> Tensor:
    num_rows = num_copies * (labels.shape[0] + (num_labels or 0))
    return labels.new_empty(num_rows, dtype=torch.int64)
