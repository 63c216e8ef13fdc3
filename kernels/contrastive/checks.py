"""Validation of the losses' arguments, once, at the public boundary.

Values of tensors are read on the CPU only, where that waits for nothing, and not by torch.compile.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..support.memory import has_memory
from ..support.names import check_name
from . import dispatch
from .batch import LABEL_DTYPES, WiderBatch, check_range, count_classes
from .options import Options

DENOMINATORS = ("all", "others", "negatives")
REDUCTIONS = ("mean", "sum", "none")
POSITIVES = ("overlap", "each")
# Less would make every tile a phase of its own, for which all threads wait.
MIN_PAIR_MEMORY = 2**20
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_options(options: Options) -> None:
    """Check all options but tensors and the temperature."""
    ignore_index, pair_memory = options.ignore_index, options.pair_memory
    check_name("denominator", options.denominator, DENOMINATORS)
    check_name("reduction", options.reduction, REDUCTIONS)
    check_name("positives", options.positives, POSITIVES)
    check_name("impl", options.impl, dispatch.IMPLEMENTATIONS)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, not {type(ignore_index).__name__}")
    if isinstance(pair_memory, bool) or not isinstance(pair_memory, int):
        raise TypeError(f"pair_memory must be an int, not {type(pair_memory).__name__}")
    if pair_memory < MIN_PAIR_MEMORY:
        raise ValueError(
            f"pair_memory is {pair_memory} bytes: it must be at least {MIN_PAIR_MEMORY} (1 MiB)"
        )


def check_number(name: str, temperature: object) -> None:
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(
            f"{name} must be a Python number or a tensor of floats, not "
            f"{type(temperature).__name__}"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"{name} is {temperature}: it must be a finite number > 0 (say 0.5)")


def check_integers(name: str, labels: Tensor) -> None:
    if labels.dtype not in LABEL_DTYPES:
        raise TypeError(
            f"{name} is {labels.dtype}: labels must be integers ({name}.long() converts them) or, "
            "for several a row, floats or bools of shape [rows, K]"
        )


def check_tensors(tensors: dict[str, Tensor], labels: Tensor, options: Options) -> None:
    """Check types, dtypes and devices."""
    labels_given = {"labels": labels}
    rows = dict(tensors)
    if options.memory_embeddings is not None:
        rows["memory_embeddings"] = options.memory_embeddings
    if options.memory_labels is not None:
        labels_given["memory_labels"] = options.memory_labels
    for name, tensor in {**labels_given, **rows}.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
    if not torch.compiler.is_compiling():
        given = {**labels_given, **rows, **options._asdict()}
        check_memory_of_tensors({k: v for k, v in given.items() if isinstance(v, Tensor)})
    embeddings = tensors["embeddings"]
    for name, tensor in rows.items():
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"{name} is {tensor.dtype}: it must be float16, bfloat16, float32 or float64"
            )
        # Under autocast a bfloat16 activation with a float32 weight is normal.
        if tensor.dtype != embeddings.dtype and not torch.is_autocast_enabled(
            embeddings.device.type
        ):
            raise TypeError(
                f"{name} is {tensor.dtype} and embeddings is {embeddings.dtype}: convert one of "
                "them (outside torch.autocast the two must agree)"
            )
        check_device(name, tensor, embeddings.device)
    for name, tensor in labels_given.items():
        check_device(name, tensor, embeddings.device)


def check_memory_of_tensors(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not has_memory(tensor):
            raise TypeError(
                f"{name} is a {type(tensor).__name__}, which has no memory of its own: pass plain "
                "tensors (of a DTensor the whole, .full_tensor())"
            )


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(
            f"{name} is on {tensor.device} and embeddings on {device}: "
            f"move one of them (.to({str(device)!r}))"
        )


def check_shapes(tensors: dict[str, Tensor], labels: Tensor) -> None:
    embeddings = tensors["embeddings"]
    shape = tuple(embeddings.shape)
    if embeddings.dim() not in (2, 3):
        raise ValueError(f"embeddings has shape {shape}: it must be [N, d], or [E, N, d] for exits")
    num_samples, width = shape[-2:]
    if width == 0:
        raise ValueError(f"embeddings has shape {shape}: the width d must be at least 1")
    if labels.dim() not in (1, 2) or labels.shape[0] != num_samples:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}: embeddings {shape} needs one label per "
            f"sample, [{num_samples}], or a row of memberships, [{num_samples}, K]"
        )
    if "label_embeddings" not in tensors:
        return
    label_shape = tuple(tensors["label_embeddings"].shape)
    if len(label_shape) != len(shape) or label_shape[:-2] != shape[:-2]:
        expected = "[K, d]" if len(shape) == 2 else f"[E, K, d] with E = {shape[0]}"
        raise ValueError(
            f"label_embeddings has shape {label_shape}: embeddings {shape} needs {expected}"
        )
    if label_shape[-1] != width:
        raise ValueError(
            f"label_embeddings has width {label_shape[-1]} and embeddings width {width}: "
            "the two must agree"
        )
    if label_shape[-2] == 0:
        raise ValueError("label_embeddings has no rows: it needs one per label, [K, d] with K >= 1")
    for name, num_rows, of in (
        ("teacher_embeddings", num_samples, "embeddings"),
        ("teacher_label_embeddings", label_shape[-2], "label_embeddings"),
    ):
        if name in tensors and tuple(tensors[name].shape) != (num_rows, width):
            raise ValueError(
                f"{name} has shape {tuple(tensors[name].shape)}: beside {of} "
                f"{tuple(tensors[of].shape)} it must be [{num_rows}, {width}], without an exit "
                "dimension (the teacher is shared by the exits)"
            )


def check_wider(wider: WiderBatch) -> None:
    """Raise TypeError or ValueError that names the argument, its value and a remedy."""
    check_mask(wider)
    check_class_weights(wider)
    check_labels(wider)
    check_memory(wider)
    for name, value in (
        ("temperature", wider.temperature),
        ("label_temperature", wider.label_temperature),
    ):
        if value is not None:
            check_temperature(name, value, wider)


def can_read(tensor: Tensor) -> bool:
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and has_memory(tensor)
        and tensor.numel() > 0
    )


def check_labels(wider: WiderBatch) -> None:
    batch = wider.batch
    num_classes, of = count_classes(wider), describe_classes(wider)
    for name, labels in (("labels", batch.labels), ("memory_labels", wider.memory_labels)):
        if labels is None:
            continue
        if labels.requires_grad:
            raise ValueError(f"{name} requires a gradient: it is a constant (.detach() it)")
        if labels.dim() == 1:
            check_integers(name, labels)
            if num_classes is not None and can_read(labels):
                counted = labels
                if name == "labels" and wider.ignore_mask is not None:
                    counted = labels[~wider.ignore_mask]
                check_range(counted, num_classes, batch.ignore_index, name, of)
            continue
        if labels.dim() != 2:
            raise ValueError(
                f"{name} has shape {tuple(labels.shape)}: it must be integers [rows], or floats or "
                "bools [rows, K]"
            )
        if labels.dtype != torch.bool and labels.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{name} has shape {tuple(labels.shape)} and {labels.dtype}: one label a row is an "
                f"integer, [rows] ({name}.squeeze(1) of [rows, 1]); several are floats or bools, "
                f"[rows, K] ({name}.bool() of zeros and ones)"
            )
        if labels.shape[1] != num_classes:
            raise ValueError(
                f"{name} has {labels.shape[1]} columns, but {of.format(num_classes)}: the two "
                "must agree"
            )
        if wider.positives == "each" and labels.dtype != torch.bool:
            raise TypeError(
                f"{name} is {labels.dtype}: positives='each' makes every label of a row an anchor "
                f"of its own and takes bools ({name}.bool() converts zeros and ones; "
                "positives='overlap' takes any memberships)"
            )
        if labels.is_floating_point() and can_read(labels):
            wrong = ~((labels >= 0) & (labels < math.inf))
            if name == "labels" and wider.ignore_mask is not None:
                wrong &= ~wider.ignore_mask[:, None]
            if wrong.any():
                row, column = wrong.nonzero()[0].tolist()
                raise ValueError(
                    f"{name}[{row}, {column}] is {float(labels[row, column])}: memberships must be "
                    "finite numbers >= 0"
                )


def describe_classes(wider: WiderBatch) -> str:
    """Return the words for where the number of classes comes from."""
    if wider.batch.num_labels is not None:
        return "label_embeddings has K = {} rows"
    if wider.class_weights is not None:
        return "class_weights has K = {} numbers"
    return "labels or memory_labels has K = {} columns"


def check_memory(wider: WiderBatch) -> None:
    embeddings, labels = wider.memory_embeddings, wider.memory_labels
    if (embeddings is None) != (labels is None):
        missing = "memory_labels" if labels is None else "memory_embeddings"
        raise ValueError(f"{missing} is missing: a memory has embeddings [Q, d] and labels")
    if embeddings is None or labels is None:
        return
    samples = wider.batch.embeddings
    shape, width = tuple(embeddings.shape), samples.shape[-1]
    if len(shape) != 2 or shape[1] != width:
        raise ValueError(
            f"memory_embeddings has shape {shape}: beside embeddings {tuple(samples.shape)} it "
            f"must be [Q, {width}]; exits share it"
        )
    if labels.shape[0] != shape[0]:
        raise ValueError(
            f"memory_labels has {labels.shape[0]} rows and memory_embeddings {shape[0]}: "
            "each row of the memory needs its label"
        )


def check_mask(wider: WiderBatch) -> None:
    mask, embeddings = wider.ignore_mask, wider.batch.embeddings
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"ignore_mask must be a tensor of bools, not {found}: True ignores a row")
    if tuple(mask.shape) != (embeddings.shape[-2],):
        raise ValueError(
            f"ignore_mask has shape {tuple(mask.shape)}: embeddings {tuple(embeddings.shape)} "
            f"needs one value per sample, [{embeddings.shape[-2]}]"
        )
    check_device("ignore_mask", mask, embeddings.device)


def check_class_weights(wider: WiderBatch) -> None:
    weights = wider.class_weights
    if weights is None:
        return
    check_weights(weights)
    num_classes = wider.batch.num_labels
    if num_classes is None:
        for labels in (wider.batch.labels, wider.memory_labels):
            if labels is not None and labels.dim() == 2:
                num_classes = labels.shape[1]
    if weights.dim() != 1 or num_classes not in (None, weights.shape[0]):
        raise ValueError(
            f"class_weights has shape {tuple(weights.shape)}: it must hold one weight per class, "
            f"[{'K' if num_classes is None else num_classes}]"
        )
    check_device("class_weights", weights, wider.batch.embeddings.device)


def check_weights(weights: Any) -> None:
    """Check what does not depend on a batch."""
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        found = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"class_weights must be a tensor of floats [K], not {found}")
    if weights.requires_grad:
        raise ValueError("class_weights requires a gradient: it is a constant (.detach() it)")
    if can_read(weights):
        wrong = ~((weights >= 0) & (weights < math.inf))
        if wrong.any():
            index = int(wrong.nonzero()[0])
            raise ValueError(
                f"class_weights[{index}] is {float(weights[index])}: weights must be finite "
                "numbers >= 0"
            )


def check_temperature_values(name: str, temperature: Any) -> None:
    """Check what does not depend on a batch."""
    if not isinstance(temperature, Tensor):
        check_number(name, temperature)
        return
    if temperature.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} is {temperature.dtype}: it must be a tensor of floats")
    if can_read(temperature):
        wrong = ~((temperature > 0) & (temperature < math.inf)).detach()
        if wrong.any():
            place = wrong.nonzero()[0].tolist()
            index = f"[{', '.join(map(str, place))}]" if place else ""
            raise ValueError(
                f"{name}{index} is {float(temperature[tuple(place)])}: temperatures must be finite "
                "numbers > 0"
            )


def check_temperature(name: str, temperature: float | Tensor, wider: WiderBatch) -> None:
    """Check its shape beside the batch, and its device."""
    if not isinstance(temperature, Tensor):
        return
    embeddings, leading = wider.batch.embeddings, wider.batch.leading
    check_device(name, temperature, embeddings.device)
    shape, num_samples = tuple(temperature.shape), embeddings.shape[-2]
    allowed: list[tuple[int, ...]] = [(), tuple(leading)] if leading else [()]
    if name == "temperature":
        allowed.append((num_samples,))
        if leading:
            num_exits = leading[0]
            allowed += [(num_exits, num_samples), (1, num_samples)]
            if shape == (num_exits,) == (num_samples,):
                raise ValueError(
                    f"temperature has shape {shape}, and E = N = {num_exits}: make it one per "
                    f"sample, temperature[None], or one per exit and sample, "
                    f"temperature[:, None].expand({num_exits}, {num_samples})"
                )
    if shape not in allowed:
        listed = " or ".join(str(list(one)) for one in dict.fromkeys(allowed))
        raise ValueError(
            f"{name} has shape {shape}: beside embeddings {tuple(embeddings.shape)} it must be "
            f"{listed}"
        )
