"""An answer from the host to a question that encoders ask the device in every forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class KnownPadding(TorchFunctionMode):
    """Within the block, `mask.all()` of an attention mask is what the host knows already.

    transformers asks it to leave out masks that mask nothing. The device would answer when it has
    done all that was started before, so that it would then stand idle until the host has gone on.

    Args:
        shape: [N, T] of the mask.
        is_full: whether no text of the batch is padded.
    """

    def __init__(self, shape: torch.Size, is_full: bool) -> None:
        super().__init__()
        self.shape = shape
        self.is_full = is_full

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        asks = func in (Tensor.all, torch.all) and len(args) == 1 and not kwargs
        if asks and args[0].dtype == torch.bool and args[0].shape == self.shape:
            return self.is_full
        return func(*args, **(kwargs or {}))
