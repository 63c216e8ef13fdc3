"""The options of the losses, and what is needed beyond a plain contrastive loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batch import LABEL_DTYPES, PAIR_MEMORY, Batch, WiderBatch, by_sample

# What makes a batch a wider one, beside names of arguments.
TENSOR_TEMPERATURE = "a tensor as temperature"


class Options(NamedTuple):
    """Keyword arguments of the losses; as in `losses`."""

    temperature: float | Tensor = 0.5
    denominator: str = "all"
    reduction: str = "mean"
    ignore_index: int = -100
    process_group: Any = None
    impl: str = "auto"
    pair_memory: int = PAIR_MEMORY
    positives: str = "overlap"
    ignore_mask: Tensor | None = None
    class_weights: Tensor | None = None
    memory_embeddings: Tensor | None = None
    memory_labels: Tensor | None = None
    label_temperature: float | Tensor | None = None


def needs_wider(labels: Tensor, options: Options) -> tuple[str, ...]:
    """Return what makes a batch a wider one, in words; () for a plain one."""
    if (
        isinstance(options.temperature, (float, int))
        and options.ignore_mask is None
        and options.class_weights is None
        and options.memory_embeddings is None
        and options.memory_labels is None
        and options.label_temperature is None
        and not (isinstance(labels, Tensor) and labels.dim() == 2)
    ):
        return ()
    needs = [
        name
        for name in (
            "ignore_mask", "class_weights", "memory_embeddings", "memory_labels",
            "label_temperature",
        )
        if getattr(options, name) is not None
    ]  # fmt: skip
    if isinstance(options.temperature, Tensor):
        needs.insert(0, TENSOR_TEMPERATURE)
    if any(
        isinstance(each, Tensor) and each.dim() == 2 for each in (labels, options.memory_labels)
    ):
        needs.insert(0, "labels [N, K]")
        if options.denominator == "negatives":
            needs.insert(1, "denominator='negatives' beside them")
    return tuple(needs)


def make_wider(batch: Batch, options: Options) -> WiderBatch:
    # Narrow integers hold neither every number of classes nor `ignore_index`.
    labels, memory_labels = (
        each.long() if each is not None and each.dim() == 1 and each.dtype in LABEL_DTYPES else each
        for each in (batch.labels, options.memory_labels)
    )
    assert labels is not None, "only a memory's may be missing"
    return WiderBatch(
        batch._replace(labels=labels), options.temperature, options.label_temperature,
        options.positives, options.ignore_mask, options.memory_embeddings, memory_labels,
        options.class_weights,
    )  # fmt: skip


def smallest_temperature(options: Options) -> float:
    """Return the smallest temperature as far as it is known without waiting for a GPU."""
    if options.label_temperature is None and not isinstance(options.temperature, Tensor):
        return float(options.temperature)
    found = []
    for temperature in (options.temperature, options.label_temperature):
        if not isinstance(temperature, Tensor):
            found += [] if temperature is None else [float(temperature)]
        elif temperature.device.type == "cpu" and not torch.compiler.is_compiling():
            found += [float(temperature.detach().min())] if temperature.numel() else []
    return min(found, default=0.5)


def describe_temperatures(wider: WiderBatch) -> list[Any]:
    """Return the temperatures as far as ranks can compare them: numbers, and kinds of tensors."""
    found: list[Any] = []
    for temperature in (wider.temperature, wider.label_temperature):
        if not isinstance(temperature, Tensor):
            found.append(temperature)
        elif temperature.dim() == 0 and temperature.device.type == "cpu":
            found.append(float(temperature.detach()))
        else:
            # The number of samples may differ.
            shape = [str(size) for size in by_sample(temperature, wider.batch).shape]
            if len(shape) > len(wider.batch.leading):
                shape[-1] = "N"
            found.append(f"{' x '.join(shape)} {temperature.dtype}".replace("torch.", ""))
    return found


def describe(wider: WiderBatch) -> dict[str, Any]:
    """Return what all ranks must have in common, in words, beside a plain batch's."""
    labels, memory, weights = wider.batch.labels, wider.memory_labels, wider.class_weights
    return {
        "labels": kind_of(labels),
        "positives": wider.positives,
        "ignore_mask": wider.ignore_mask is not None,
        "memory": None if memory is None else [memory.shape[0], kind_of(memory)],
        "class_weights": None if weights is None else weights.shape[0],
    }


def kind_of(labels: Tensor) -> str:
    columns = "".join(f" x {size}" for size in labels.shape[1:])
    return f"{labels.dtype}{columns}".replace("torch.", "")
