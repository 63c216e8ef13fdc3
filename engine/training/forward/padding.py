"""The value of attention_mask.all(), given by the host so that no pass waits for the device."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class KnownPadding(TorchFunctionMode):
    """Within the block, `mask.all()` of this attention mask is what the host knows already.

    transformers calls it on the boolean mask, to drop a mask that masks nothing. If the device
    computed it, the host would wait for all queued work, and the device would then be idle. Other
    tensors are unaffected.

    Args:
        mask: [N, T], as it is passed to the encoder.
        is_full: whether no text of the batch is padded.
    """

    def __init__(self, mask: Tensor, is_full: bool) -> None:
        super().__init__()
        self.masks = [mask]
        self.is_full = is_full

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        is_mask = bool(args) and any(args[0] is mask for mask in self.masks)
        if is_mask and func in (Tensor.all, torch.all) and len(args) == 1 and not kwargs:
            return self.is_full
        result = func(*args, **(kwargs or {}))
        if is_mask and func in (Tensor.to, Tensor.bool) and result.dtype == torch.bool:
            self.masks.append(result)
        return result
