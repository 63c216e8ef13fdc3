"""Dropout on a CPU at a quarter of its time, most of which PyTorch spends on drawing numbers.

PyTorch draws a number of 32 bits for each element, one after another; here four elements share one
of 64 bits. A probability is therefore a multiple of 2**-16, and kept elements grow accordingly.
"""

import contextlib
import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ...runtime.device import computes

_LEVELS = 2**16


class FastDropout(TorchFunctionMode):
    """Within the block, dropout of tensors on the CPU, also that of the weights of attention.

    The numbers are the default generator's, whatever the number of threads. A checkpointed part of
    the model must run in such a block again, else it would draw other ones.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.dropout and (found := dropout(*args, **kwargs)) is not None:
            return found
        if func is functional.scaled_dot_product_attention:
            found = attention(*args, **kwargs)
            if found is not None:
                return found
        return func(*args, **kwargs)


def fast_dropout(device: torch.device, compiled: bool) -> AbstractContextManager[Any]:
    """Context of a forward pass on a device."""
    return FastDropout() if device.type == "cpu" and not compiled else contextlib.nullcontext()


def runs_again(model: nn.Module) -> bool:
    """True if a part of the model repeats its forward pass in the backward pass."""
    # transformers marks such modules; torch.distributed wraps them.
    return any(
        getattr(module, "gradient_checkpointing", False) is True
        or isinstance(module, CheckpointWrapper)
        for module in model.modules()
    )


def dropout(
    x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor | None:
    """Return what `torch.nn.functional.dropout` does, or None if that must be asked."""
    num_dropped = round(p * _LEVELS)
    is_mine = x.device.type == "cpu" and x.is_floating_point() and not inplace
    if not (training and is_mine and 0 < num_dropped < _LEVELS):
        return None
    return x * mask_of(x, num_dropped)


def mask_of(x: Tensor, num_dropped: int) -> Tensor:
    """Return a tensor like x of factors, 0 with a probability of num_dropped / 2**16."""
    # Four elements a number; its whole range, for the sign is a bit like the others.
    numbers = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    parts = numbers.view(torch.int16)[: x.numel()].view(x.shape)
    kept = parts >= num_dropped - _LEVELS // 2
    return kept.to(x.dtype).mul_(_LEVELS / (_LEVELS - num_dropped))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Return what `scaled_dot_product_attention` does, or None if that must be asked.

    With dropout it has no fused implementation on a CPU either, and takes the same steps. Inputs in
    bfloat16 it multiplies in float32; here they are multiplied as they are, with float32 between.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    is_plain = dtype == torch.float32 or (dtype == torch.bfloat16 and computes(dtype))
    if not (dropout_p > 0 and is_plain and query.device.type == "cpu") or is_causal or enable_gqa:
        return None
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    with torch.autocast("cpu", enabled=False):
        query, key, value = (x.to(dtype) for x in (query, key, value))
        scores = ((query * scale) @ key.mT).float()
        if attn_mask is None:
            weights = scores.softmax(-1)
        else:
            if attn_mask.dtype == torch.bool:
                scores = scores.masked_fill(~attn_mask, -torch.inf)
            else:
                scores = scores + attn_mask
            # Zeros for a query without any key.
            weights = torch._safe_softmax(scores, -1)
        dropped = dropout(weights, dropout_p)
        dropped = functional.dropout(weights, dropout_p) if dropped is None else dropped
        return dropped.to(dtype) @ value
