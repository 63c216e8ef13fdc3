"""The contrastive losses as modules: options in the constructor, tensors in the call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .batch import PAIR_MEMORY
from .checks import check_options
from .losses import acl_cl_loss, acl_loss, supcon_loss
from .sharded.agreement import ProcessGroup


class ContrastiveLoss(nn.Module):
    """Options that the three losses share; those of `supcon_loss`.

    Raises:
        TypeError, ValueError: the message names the argument, its value and a remedy.
    """

    def __init__(
        self,
        *,
        temperature: float = 0.5,
        denominator: str = "all",
        reduction: str = "mean",
        ignore_index: int = -100,
        process_group: ProcessGroup | None = None,
        impl: str = "auto",
        pair_memory: int = PAIR_MEMORY,
    ) -> None:
        super().__init__()
        check_options(temperature, denominator, reduction, ignore_index, impl, pair_memory)
        self.temperature = temperature
        self.denominator = denominator
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.process_group = process_group
        self.impl = impl
        self.pair_memory = pair_memory

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the functions."""
        return {
            "temperature": self.temperature,
            "denominator": self.denominator,
            "reduction": self.reduction,
            "ignore_index": self.ignore_index,
            "process_group": self.process_group,
            "impl": self.impl,
            "pair_memory": self.pair_memory,
        }

    def extra_repr(self) -> str:
        shown = {name: value for name, value in self.options.items() if value is not None}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


class SupConLoss(ContrastiveLoss):
    """`supcon_loss` as a module: supervised contrastive loss of the samples of a batch (SCL)."""

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Loss of embeddings [N, d] or [E, N, d] with labels [N]."""
        return supcon_loss(embeddings, labels, **self.options)


class ACLLoss(ContrastiveLoss):
    """`acl_loss` as a module: samples and label embeddings (ACL-Embed)."""

    def forward(self, embeddings: Tensor, labels: Tensor, label_embeddings: Tensor) -> Tensor:
        """Loss of embeddings [N, d] with label embeddings [K, d], or [E, N, d] with [E, K, d]."""
        return acl_loss(embeddings, labels, label_embeddings, **self.options)


class ACLCLLoss(ContrastiveLoss):
    """`acl_cl_loss` as a module: an exit and its teacher, the last exit (ACL-CL)."""

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        label_embeddings: Tensor,
        teacher_embeddings: Tensor,
        teacher_label_embeddings: Tensor,
    ) -> Tensor:
        """Loss as `ACLLoss`, with the teacher's constants [N, d] and [K, d]."""
        return acl_cl_loss(
            embeddings,
            labels,
            label_embeddings,
            teacher_embeddings,
            teacher_label_embeddings,
            **self.options,
        )
