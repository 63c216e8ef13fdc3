"""The contrastive losses as modules: options in the constructor, tensors in the call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .batch import PAIR_MEMORY
from .checks import check_options, check_temperature_values, check_weights
from .losses import acl_cl_loss, acl_loss, supcon_loss
from .options import Options
from .sharded.agreement import ProcessGroup

OPTIONS = (
    "temperature", "denominator", "reduction", "ignore_index", "process_group", "impl",
    "pair_memory", "positives", "class_weights", "label_temperature",
)  # fmt: skip


class ContrastiveLoss(nn.Module):
    """Options that the three losses share; those of `supcon_loss`.

    A temperature that is an `nn.Parameter` is trained. `forward` takes the tensors of a batch that
    `supcon_loss` names beside its labels too: ignore_mask, memory_embeddings and memory_labels.

    Raises:
        TypeError, ValueError: the message names the argument, its value and a remedy.
    """

    def __init__(
        self,
        *,
        temperature: float | Tensor = 0.5,
        denominator: str = "all",
        reduction: str = "mean",
        ignore_index: int = -100,
        process_group: ProcessGroup | None = None,
        impl: str = "auto",
        pair_memory: int = PAIR_MEMORY,
        positives: str = "overlap",
        class_weights: Tensor | None = None,
        label_temperature: float | Tensor | None = None,
    ) -> None:
        super().__init__()
        check_options(
            Options(
                denominator=denominator, reduction=reduction, ignore_index=ignore_index, impl=impl,
                pair_memory=pair_memory, positives=positives,
            )
        )  # fmt: skip
        check_temperature_values("temperature", temperature)
        if label_temperature is not None:
            check_temperature_values("label_temperature", label_temperature)
        if class_weights is not None:
            check_weights(class_weights)
        # A parameter is trained with the module's; other tensors move with it.
        for name, tensor in (
            ("temperature", temperature),
            ("label_temperature", label_temperature),
            ("class_weights", class_weights),
        ):
            if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter):
                self.register_buffer(name, tensor, persistent=False)
            else:
                setattr(self, name, tensor)
        self.denominator = denominator
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.process_group = process_group
        self.impl = impl
        self.pair_memory = pair_memory
        self.positives = positives

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the functions."""
        return {name: getattr(self, name) for name in OPTIONS}

    def extra_repr(self) -> str:
        shown = {name: value for name, value in self.options.items() if value is not None}
        for name, value in shown.items():
            if isinstance(value, Tensor) and value.numel() == 1 and value.device.type == "cpu":
                shown[name] = value.item()
            elif isinstance(value, Tensor):
                shown[name] = f"tensor{list(value.shape)}"
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


class SupConLoss(ContrastiveLoss):
    """`supcon_loss` as a module: supervised contrastive loss of the samples of a batch (SCL)."""

    def __init__(self, **options: Any) -> None:
        if options.get("label_temperature") is not None:
            raise TypeError(
                "label_temperature: SupConLoss has no label embeddings; leave it out, or use "
                "ACLLoss"
            )
        super().__init__(**options)

    def forward(self, embeddings: Tensor, labels: Tensor, **batch: Any) -> Tensor:
        """Loss of embeddings [N, d] or [E, N, d] with labels [N] or [N, K]."""
        options = {name: self.options[name] for name in OPTIONS if name != "label_temperature"}
        return supcon_loss(embeddings, labels, **options, **batch)


class ACLLoss(ContrastiveLoss):
    """`acl_loss` as a module: samples and label embeddings (ACL-Embed)."""

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        label_embeddings: Tensor,
        **batch: Any,
    ) -> Tensor:
        """Loss of embeddings [N, d] with label embeddings [K, d], or [E, N, d] with [E, K, d]."""
        return acl_loss(embeddings, labels, label_embeddings, **self.options, **batch)


class ACLCLLoss(ContrastiveLoss):
    """`acl_cl_loss` as a module: an exit and its teacher, the last exit (ACL-CL)."""

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        label_embeddings: Tensor,
        teacher_embeddings: Tensor,
        teacher_label_embeddings: Tensor,
        **batch: Any,
    ) -> Tensor:
        """Loss as `ACLLoss`, with the teacher's constants [N, d] and [K, d]."""
        return acl_cl_loss(
            embeddings,
            labels,
            label_embeddings,
            teacher_embeddings,
            teacher_label_embeddings,
            **self.options,
            **batch,
        )
