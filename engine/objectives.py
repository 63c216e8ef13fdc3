"""The losses of a batch: cross-entropy, and the contrastive term that goes with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels import acl_loss, supcon_loss
from .config import ObjectiveOptions
from .modeling import MultiExitOutput


@dataclass(frozen=True)
class ExitLosses:
    """One value an exit: L_ce [E], and the contrastive L_scl or L_acl [E] where there is one."""

    main: Tensor
    auxiliary: Tensor | None

    def weighted(self, weight: float) -> Tensor:
        """(1 - weight) main + weight auxiliary, summed over the exits; weight is lambda."""
        if self.auxiliary is None:
            return self.main.sum()
        return ((1 - weight) * self.main + weight * self.auxiliary).sum()


def exit_losses(
    options: ObjectiveOptions, output: MultiExitOutput, label_embeddings: Tensor, labels: Tensor
) -> ExitLosses:
    """Losses of E exits on one batch.

    Args:
        output: exit_logits [E, N, K] and exit_embeddings [E, N, d] of a forward pass.
        label_embeddings: the classifiers' weights [E, K, d].
        labels: [N], classes.
    """
    logits = output.exit_logits.float()  # [E, N, K]
    num_exits, num_samples, num_labels = logits.shape
    cross_entropy = functional.cross_entropy(
        logits.view(-1, num_labels), labels.repeat(num_exits), reduction="none"
    ).view(num_exits, num_samples)
    settings: dict[str, Any] = {
        "temperature": options.temperature,
        "denominator": options.denominator,
        "reduction": options.contrastive_reduction,
        "impl": options.impl,
    }
    auxiliary = None
    if options.objective == "scl":
        auxiliary = supcon_loss(output.exit_embeddings, labels, **settings)
    elif options.objective == "acl":
        auxiliary = acl_loss(output.exit_embeddings, labels, label_embeddings, **settings)
    return ExitLosses(cross_entropy.mean(dim=1), auxiliary)


def check_finite(output: MultiExitOutput, step: int) -> None:
    """Refuse to train on NaN or infinite representations.

    Raises:
        FloatingPointError: naming the exit, the number of bad samples and the step.
    """
    bad = ~torch.isfinite(output.exit_embeddings).all(dim=-1)  # [E, N]
    for index, count in enumerate(bad.sum(dim=1).tolist()):
        if count:
            raise FloatingPointError(
                f"Step {step}: the representations of {count} of {bad.shape[1]} samples at exit "
                f"{index + 1} of {bad.shape[0]} are NaN or infinite. A lower learning_rate, "
                "max_grad_norm=1, or bf16 instead of fp16 usually helps."
            )
