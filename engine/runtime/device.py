"""The device and the floating-point precision of a run."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

logger = logging.getLogger("fusedacl")


def choose_device(name: str) -> torch.device:
    """Return the device for 'auto', 'cpu' or 'cuda'.

    Raises:
        ValueError: cuda is asked for and this torch sees no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device=cuda: torch sees no GPU here. Use device=cpu, or install a CUDA build of torch."
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def choose_dtype(device: torch.device, *, fp16: bool, bf16: bool) -> torch.dtype:
    """Return the dtype of matrix products under autocast; float32 means no autocast.

    Raises:
        ValueError: bf16 on a GPU without it (before Ampere, such as V100).
    """
    if bf16 and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8:
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"bf16: {name} has no bfloat16 arithmetic. Use fp16.")
    dtype = torch.float16 if fp16 else torch.bfloat16 if bf16 else torch.float32
    if device.type == "cpu" and not computes(dtype):
        _warn_slow("fp16" if fp16 else "bf16")
    return dtype


def set_tf32(wanted: bool | None) -> bool | None:
    """Choose whether GPUs take float32 products in TF32; returns what it was. None: leave it.

    Raises:
        ValueError: there is no GPU with TF32 (Ampere and newer).
    """
    if wanted is None:
        return None
    has = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8
    if wanted and not has:
        raise ValueError("tf32: this machine has no GPU with TF32 (Ampere or newer). Leave it out.")
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = wanted
    return before


def computes(dtype: torch.dtype) -> bool:
    """Return whether this CPU has matrix products of that dtype; otherwise they are emulated."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


@functools.cache
def _warn_slow(name: str) -> None:
    logger.warning(
        "%s: this CPU has no such arithmetic and emulates it, tens of times slower than float32. "
        "Leave %s out, unless results in that precision are what you want.",
        name, name,
    )  # fmt: skip


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Return the autocast context of a forward pass; it does nothing for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode; afterwards every module is in the mode it had."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without "torch.", such as float32."""
    return str(dtype).removeprefix("torch.")
