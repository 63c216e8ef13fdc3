"""Validation of the losses' arguments, once, at the public boundary."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..support.names import check_name
from . import dispatch

DENOMINATORS = ("all", "others", "negatives")
REDUCTIONS = ("mean", "sum", "none")
LABEL_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# Less would make every tile a phase of its own, for which all threads wait.
MIN_PAIR_MEMORY = 2**20
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_options(
    temperature: float,
    denominator: str,
    reduction: str,
    ignore_index: int,
    impl: str,
    pair_memory: int,
) -> None:
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(
            f"temperature must be a Python number, not {type(temperature).__name__}: it is a "
            "constant of the loss and gets no gradient (float(temperature) converts a tensor)"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}: it must be a finite number > 0 (say 0.5)")
    check_name("denominator", denominator, DENOMINATORS)
    check_name("reduction", reduction, REDUCTIONS)
    check_name("impl", impl, dispatch.IMPLEMENTATIONS)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, not {type(ignore_index).__name__}")
    if isinstance(pair_memory, bool) or not isinstance(pair_memory, int):
        raise TypeError(f"pair_memory must be an int, not {type(pair_memory).__name__}")
    if pair_memory < MIN_PAIR_MEMORY:
        raise ValueError(
            f"pair_memory is {pair_memory} bytes: it must be at least {MIN_PAIR_MEMORY} (1 MiB)"
        )


def check_tensors(tensors: dict[str, Tensor], labels: Tensor) -> None:
    """Check types, dtypes and devices."""
    for name, tensor in {"labels": labels, **tensors}.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
    if labels.dtype not in LABEL_DTYPES:
        raise TypeError(
            f"labels is {labels.dtype}: labels must be integers (labels.long() converts them)"
        )
    embeddings = tensors["embeddings"]
    for name, tensor in tensors.items():
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
    check_device("labels", labels, embeddings.device)


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
    if tuple(labels.shape) != (num_samples,):
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}: embeddings {shape} needs one label per "
            f"sample, [{num_samples}]"
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
