"""Fast dropout in every module of a model that runs on a CPU, and in its attention."""

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
from ...runtime.dropout import dropout


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
    """Return what `scaled_dot_product_attention` does, or None where that must be called.

    With dropout, PyTorch has no fused implementation on a CPU either and takes these steps, but
    multiplies bfloat16 inputs in float32. Here the products stay in bfloat16, and the softmax
    between them is in float32.
    """
    # Autocast leaves float64 as it is.
    casts = torch.is_autocast_enabled("cpu") and query.dtype != torch.float64
    dtype = torch.get_autocast_dtype("cpu") if casts else query.dtype
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
