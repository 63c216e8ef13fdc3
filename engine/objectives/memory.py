"""A memory of representations for the contrastive losses (cross-batch memory).

Source: Wang et al. 2020, arXiv 1912.06798.
"""

import torch
from torch import Tensor, nn

from ..model.answers import IGNORED


class MemoryBank(nn.Module):
    """The last Q representations and their labels, as constants, the oldest first.

        memory = MemoryBank(4096, width=64)
        loss = supcon_loss(
            x, y, memory_embeddings=memory.embeddings, memory_labels=memory.labels
        )
        memory.add(x, y)

    Rows that are not filled yet have the label `ignore_index`, so they do not exist for the loss
    and shapes never change. Move it with `.to(device)` and save its `state_dict`, which holds all
    of it: a continued run then has the same losses bit for bit. With several processes each has the
    samples that it was given.

    Args:
        size: Q.
        width: d.
        dtype: of the representations kept; a loss outside autocast takes that of its embeddings.
        ignore_index: that of the loss.

    Raises:
        ValueError: size or width is below 1, or dtype is no floating point.
    """

    embeddings: Tensor  # [Q, d]
    labels: Tensor  # [Q]

    def __init__(
        self,
        size: int,
        width: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        ignore_index: int = IGNORED,
    ) -> None:
        super().__init__()
        for name, value in (("size", size), ("width", width)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value} must be an integer of at least 1.")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype={dtype} must be a floating-point type, such as torch.float32.")
        self.register_buffer("embeddings", torch.zeros(size, width, dtype=dtype, device=device))
        labels = torch.full((size,), ignore_index, dtype=torch.int64, device=device)
        self.register_buffer("labels", labels)

    @torch.no_grad()
    def add(self, embeddings: Tensor, labels: Tensor) -> None:
        """Let samples in, in their order; as many of the oldest rows leave.

        Losses that were computed before keep the rows that they have read.

        Args:
            embeddings: [N, d], of which the last Q are kept; finite, which is not checked, since a
                GPU would have to be waited for.
            labels: [N] integers. A sample labelled `ignore_index` fills a row that no loss counts.

        Raises:
            ValueError: the shapes do not fit, labels are no integers, or something is on another
                device.
        """
        size, width = self.embeddings.shape
        if embeddings.dim() != 2 or embeddings.shape[1] != width:
            raise ValueError(
                f"embeddings has shape {tuple(embeddings.shape)}: this memory takes [N, {width}] "
                "(with several exits, pass those of one)."
            )
        is_integer = not labels.dtype.is_floating_point and labels.dtype != torch.bool
        if labels.shape != embeddings.shape[:1] or not is_integer:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)} and dtype {labels.dtype}: it must hold "
                f"one integer per sample, [{len(embeddings)}]."
            )
        for name, given in (("embeddings", embeddings), ("labels", labels)):
            if given.device != self.labels.device:
                raise ValueError(
                    f"{name} is on {given.device} and the memory on {self.labels.device}: move "
                    f"the memory with .to({str(given.device)!r})."
                )
        number = min(len(labels), size)
        first = len(labels) - number
        # New tensors, because a backward pass may still read the old ones.
        rows = embeddings[first:].to(self.embeddings.dtype)
        self.embeddings = torch.cat([self.embeddings[number:], rows])
        rows = labels[first:].to(self.labels.dtype)
        self.labels = torch.cat([self.labels[number:], rows])
