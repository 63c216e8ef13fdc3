"""The rows of a contrastive batch and the arguments of its loss.

The M rows are, in this order: samples, label embeddings, teacher samples, teacher label embeddings.
Teacher rows are constants, so the rows that receive a gradient come first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# A vector this short has no direction: it normalizes to zero and its gradient is zero.
ZERO_NORM = 1e-12
LABEL_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# Bytes of exponentials of pairs that a CPU keeps for the gradient, unless a call says otherwise.
PAIR_MEMORY = 64 * 2**20


class Batch(NamedTuple):
    """Arguments of a contrastive loss, already checked; shapes and options as in `losses`.

    Label embeddings and teacher rows are None where the loss has none. Teacher rows are shared by
    the exits and have no gradient.
    """

    embeddings: Tensor
    labels: Tensor
    label_embeddings: Tensor | None
    teacher_embeddings: Tensor | None
    teacher_label_embeddings: Tensor | None
    temperature: float
    denominator: str
    reduction: str
    ignore_index: int
    pair_memory: int = PAIR_MEMORY

    @property
    def parts(self) -> list[Tensor]:
        """The tensors that hold rows, in row order."""
        parts = (
            self.embeddings, self.label_embeddings, self.teacher_embeddings,
            self.teacher_label_embeddings,
        )  # fmt: skip
        return [part for part in parts if part is not None]

    @property
    def leading(self) -> torch.Size:
        """(E,) with exits, else ()."""
        return self.embeddings.shape[:-2]

    @property
    def loss_shape(self) -> tuple[int, ...]:
        """The shape of the loss: leading, for "none" followed by M."""
        return (*self.leading, self.num_rows) if self.reduction == "none" else self.leading

    @property
    def num_labels(self) -> int | None:
        return None if self.label_embeddings is None else self.label_embeddings.shape[-2]

    @property
    def num_classes(self) -> int:
        """C: the number K of label embeddings or, without them, the number of samples."""
        num_labels = self.num_labels
        return self.labels.shape[0] if num_labels is None else num_labels

    @property
    def num_rows(self) -> int:
        """The number M of rows."""
        return sum(part.shape[-2] for part in self.parts)

    @property
    def num_copies(self) -> int:
        """2 when teacher rows repeat the student's, else 1."""
        return 1 if self.teacher_embeddings is None else 2

    @property
    def accumulate_dtype(self) -> torch.dtype:
        return accumulate_dtype(*(part.dtype for part in self.parts))

    def concatenate(self, dtype: torch.dtype) -> Tensor:
        """Copy all rows into one tensor [.., M, d]."""
        parts = self.parts
        teacher = [part.expand(*self.leading, -1, -1) for part in parts[2:]]
        return torch.cat([*parts[:2], *teacher], dim=-2).to(dtype)

    def find_classes(self) -> tuple[Tensor, bool]:
        """Return `compute_classes` of this batch's labels."""
        arguments = (self.labels, self.num_labels, self.ignore_index, self.num_copies)
        if torch.compiler.is_compiling():
            return row_classes(*arguments), True
        return compute_classes(*arguments)

    def shape(self, trains_samples: bool, trains_labels: bool) -> BatchShape:
        label_embeddings = self.label_embeddings
        return BatchShape(
            self.embeddings.shape[-2], self.num_labels, self.num_classes,
            self.embeddings.shape[-1],
            self.temperature, self.denominator, self.reduction, self.ignore_index,
            self.embeddings.dtype, None if label_embeddings is None else label_embeddings.dtype,
            trains_samples, trains_labels, self.pair_memory,
        )  # fmt: skip


class WiderBatch(NamedTuple):
    """A batch with options that a plain `Batch` lacks, already checked; as in `losses`.

    They are other temperatures, several labels per row, ignore_mask, class_weights and a memory.
    The R rows are those of `Batch`, then the memory's. The first A = num_copies (N + K) are
    anchors, the first N + K of which may have a gradient.

    batch: its labels may be memberships [N, K]. Its temperature is the smallest that is known.
    """

    batch: Batch
    temperature: float | Tensor
    label_temperature: float | Tensor | None
    positives: str
    ignore_mask: Tensor | None
    memory_embeddings: Tensor | None
    memory_labels: Tensor | None
    class_weights: Tensor | None

    @property
    def num_trained(self) -> int:
        """N + K, the number of rows that may have a gradient."""
        return self.batch.num_rows // self.batch.num_copies

    @property
    def num_anchors(self) -> int:
        return self.batch.num_rows

    def trained_rows(self, dtype: torch.dtype) -> Tensor:
        """Copy samples and label embeddings into one tensor [.., N + K, d]."""
        return torch.cat(self.batch.parts[:2], dim=-2).to(dtype)

    def constant_rows(self, dtype: torch.dtype) -> Tensor | None:
        """Return all other rows as one tensor [R - N - K, d]; None if there are none."""
        parts = self.batch.parts[2:]
        if self.memory_embeddings is not None:
            parts.append(self.memory_embeddings.detach())
        if not parts:
            return None
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).to(dtype)

    def anchor_temperatures(self, dtype: torch.dtype) -> Tensor:
        """Return the temperature of all anchors: a scalar or [E], or that of each, [.., A]."""
        batch, device = self.batch, self.batch.embeddings.device
        of_samples, of_labels = self.temperature, self.label_temperature
        if isinstance(of_samples, Tensor):
            of_samples = by_sample(of_samples, batch)
        else:
            of_samples = torch.tensor(of_samples, dtype=dtype, device=device)
        of_samples = of_samples.to(dtype)
        per_sample = of_samples.dim() > len(batch.leading)
        if of_labels is None and not per_sample:
            return of_samples
        if of_labels is None:
            if of_samples.shape[-1] == 0 and self.num_anchors > 0:
                raise ValueError(
                    "temperature is empty: there is no sample whose mean the label embeddings "
                    "could take (pass label_temperature)"
                )
            of_labels = of_samples.mean(-1) if self.num_anchors else of_samples.sum(-1)
        of_labels = torch.as_tensor(of_labels, dtype=dtype, device=device)
        num_samples = batch.embeddings.shape[-2]
        if not per_sample:
            of_samples = of_samples[..., None]
        samples = of_samples.expand(*batch.leading, num_samples)
        others = of_labels[..., None].expand(*batch.leading, self.num_anchors - num_samples)
        return torch.cat([samples, others], dim=-1)


class BatchShape(NamedTuple):
    """Sizes, options and dtypes of a batch, and which inputs need a gradient."""

    num_samples: int
    num_labels: int | None
    num_classes: int
    width: int
    temperature: float
    denominator: str
    reduction: str
    ignore_index: int
    sample_dtype: torch.dtype
    label_dtype: torch.dtype | None
    trains_samples: bool
    trains_labels: bool
    pair_memory: int = PAIR_MEMORY

    @property
    def num_student_rows(self) -> int:
        """N + K, the number of rows without the teacher's."""
        return self.num_samples + (self.num_labels or 0)

    @property
    def trained_rows(self) -> tuple[int, int]:
        """The first row with a gradient, and the row after the last one."""
        first = 0 if self.trains_samples else self.num_samples
        return first, self.num_student_rows if self.trains_labels else self.num_samples


def accumulate_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype of the computation: float64 if an input is float64, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def compute_classes(
    labels: Tensor, num_labels: int | None, ignore_index: int, num_copies: int
) -> tuple[Tensor, bool]:
    """Return the class ids [M] of all rows and whether some rows may be ignored.

    There are C classes; an ignored row has the id C. With `num_labels` = K label embeddings, C = K:
    a sample's id is its label, and label embedding k has the id k. Without label embeddings (None)
    labels [N] are any integers, C = N, and equal labels share an id. On the CPU, where it need not
    wait, ValueError names a label outside [0, K).
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


def check_range(
    labels: Tensor,
    num_labels: int,
    ignore_index: int,
    name: str = "labels",
    of: str = "label_embeddings has K = {} rows",
) -> None:
    """Raise ValueError for the first label that is neither in [0, K) nor `ignore_index`."""
    outside = ((labels < 0) | (labels >= num_labels)) & (labels != ignore_index)
    if outside.any():
        raise ValueError(
            f"{name} holds {int(labels[outside][0])}, but {of.format(num_labels)}: a label must "
            f"lie in [0, {num_labels}) or be ignore_index = {ignore_index}"
        )


def by_sample(temperature: Tensor, batch: Batch) -> Tensor:
    """Return temperatures as a scalar, [E] or, one per sample, [.., N], [1, N] for all exits."""
    if temperature.dim() == 1 and batch.leading:
        # `check_temperature` refuses one that could be both.
        return (
            temperature if tuple(temperature.shape) == tuple(batch.leading) else temperature[None]
        )
    return temperature


def count_classes(wider: WiderBatch) -> int | None:
    """Return K, or None where labels are any integers."""
    batch, memory_labels = wider.batch, wider.memory_labels
    if batch.num_labels is not None:
        return batch.num_labels
    if wider.class_weights is not None:
        return wider.class_weights.shape[0]
    for labels in (batch.labels, memory_labels):
        if labels is not None and labels.dim() == 2:
            return labels.shape[1]
    return None


def existing_rows(wider: WiderBatch) -> Tensor:
    """Return bool [R]: False for rows whose integer label or mask says that they are ignored."""
    batch = wider.batch
    samples = not_ignored(batch.labels, batch.ignore_index)
    if wider.ignore_mask is not None:
        samples = samples & ~wider.ignore_mask
    parts = [samples]
    if batch.num_labels is not None:
        parts.append(samples.new_ones(batch.num_labels))
    parts *= batch.num_copies
    if wider.memory_labels is not None:
        parts.append(not_ignored(wider.memory_labels, batch.ignore_index))
    return torch.cat(parts)


def not_ignored(labels: Tensor, ignore_index: int) -> Tensor:
    if labels.dim() == 1:
        return labels != ignore_index
    return torch.ones(labels.shape[0], dtype=torch.bool, device=labels.device)


def memberships_of(labels: Tensor, num_classes: int) -> Tensor:
    """Return float64 [.., K]; one-hot rows for integers [..]."""
    if labels.dim() == 2:
        return labels.double()
    # Labels outside [0, K) belong to rows that are left out.
    inside = labels.masked_fill((labels < 0) | (labels >= num_classes), 0)
    return torch.nn.functional.one_hot(inside, num_classes).double()


# torch.compile cannot trace code that depends on the labels' values, so it sees an operator.
@torch.library.custom_op("fusedacl::row_classes", mutates_args=())
def row_classes(
    labels: Tensor, num_labels: int | None, ignore_index: int, num_copies: int
) -> Tensor:
    """Return the class ids of `compute_classes`."""
    classes, _ = compute_classes(labels, num_labels, ignore_index, num_copies)
    return classes


@row_classes.register_fake
def _(labels: Tensor, num_labels: int | None, ignore_index: int, num_copies: int) -> Tensor:
    num_rows = num_copies * (labels.shape[0] + (num_labels or 0))
    return labels.new_empty(num_rows, dtype=torch.int64)
