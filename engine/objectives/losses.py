"""The losses of a batch: cross-entropy, distillation, and the contrastive term beside them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

from ...kernels import acl_cl_loss, acl_loss, supcon_loss
from ..config.sections import ObjectiveOptions
from ..model.answers import contrasted_labels, cross_entropies
from ..model.multi_exit import MultiExitOutput
from ..runtime.profiler_marks import CONTRASTIVE_LOSS, FORWARD, part


@dataclass(frozen=True)
class ExitLosses:
    """Losses of E exits: main L_ce [E], and the contrastive L_scl or L_acl [E] if there is one.

    With distillation `main` is (1 - w) L_ce + w L_kd. `cross_entropy` [E] is L_ce alone, without
    a graph, for the log.
    """

    main: Tensor
    auxiliary: Tensor | None
    cross_entropy: Tensor | None = None

    def times(self, main: float | Tensor, auxiliary: float | Tensor) -> "ExitLosses":
        """Each loss multiplied by its factor."""
        return ExitLosses(
            main * self.main,
            None if self.auxiliary is None else auxiliary * self.auxiliary,
            None if self.cross_entropy is None else main * self.cross_entropy,
        )

    def values(self) -> Tensor:
        """main, cross_entropy and auxiliary (0 if there is none), without their graph: [3, E]."""
        zeros = torch.zeros_like(self.main)
        found = (self.main, self.cross_entropy, self.auxiliary)
        return torch.stack([zeros if values is None else values.detach() for values in found])

    def weighted(self, weight: float) -> Tensor:
        """(1 - weight) main + weight auxiliary, summed over the exits; weight is lambda."""
        if self.auxiliary is None:
            return self.main.sum()
        return ((1 - weight) * self.main + weight * self.auxiliary).sum()


@dataclass(frozen=True)
class Teacher:
    """Output of the frozen last exit on the same batch, as constants.

    embeddings [N, d], label_embeddings [K, d], logits [N, K].
    """

    embeddings: Tensor
    label_embeddings: Tensor
    logits: Tensor


class Memory(NamedTuple):
    """Representations [Q, d] of earlier samples, as constants, and their labels [Q]."""

    embeddings: Tensor
    labels: Tensor


def exit_losses(
    options: ObjectiveOptions,
    output: MultiExitOutput,
    label_embeddings: Tensor,
    labels: Tensor,
    teacher: Teacher | None = None,
    process_group: ProcessGroup | None = None,
    class_weights: Tensor | None = None,
    memory: Memory | None = None,
    num_texts: Tensor | None = None,
) -> ExitLosses:
    """Losses of E exits on one batch.

    Args:
        output: exit_logits [E, N, K] and exit_embeddings [E, N, d] of a forward pass.
        label_embeddings: the classifiers' weights [E, K, d].
        labels: classes [N], or zeros and ones [N, K] where texts may have several labels;
            `IGNORED` for a text that counts in no loss.
        teacher: the last exit, if the others learn from it: by `distill_weight`, and as rows of
            the contrastive batch (ACL-CL) if `cross_layer` is on.
        process_group: processes whose samples are contrasted with each other; None: the samples
            of this process alone.
        class_weights: of the classes in the cross-entropy, and of the anchors [K], of mean 1 over
            the training texts.
        memory: more representations to contrast with.
        num_texts: number [] by which the cross-entropy is divided; None: of all texts.
    """
    main, cross_entropy = main_losses(options, output, labels, teacher, class_weights, num_texts)
    auxiliary = contrastive_loss(
        options, output.exit_embeddings, label_embeddings, labels, teacher, process_group,
        class_weights, memory,
    )  # fmt: skip
    return ExitLosses(main, auxiliary, cross_entropy)


@part(FORWARD)
def main_losses(
    options: ObjectiveOptions,
    output: MultiExitOutput,
    labels: Tensor,
    teacher: Teacher | None = None,
    class_weights: Tensor | None = None,
    num_texts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`ExitLosses.main` [E] and `ExitLosses.cross_entropy` [E]; arguments as for `exit_losses`.

    The weighted cross-entropy is divided by the number of texts, not by the sum of their weights:
    so it is the same however a batch is divided into micro-batches and among processes.
    """
    logits = output.exit_logits.float()  # [E, N, K]
    cross_entropy = cross_entropies(
        logits,
        labels,
        class_weights=class_weights,
        label_smoothing=options.label_smoothing_factor,
    )
    cross_entropy = (
        cross_entropy.mean(dim=1) if num_texts is None else cross_entropy.sum(dim=1) / num_texts
    )
    main = cross_entropy
    if teacher is not None and options.distill_weight > 0:
        weight = options.distill_weight
        main = (1 - weight) * main + weight * distillation(
            logits, teacher.logits.float(), options.distill_temperature, several=labels.dim() == 2
        )
    return main, cross_entropy.detach()


def contrastive_loss(
    options: ObjectiveOptions,
    samples: Tensor,
    label_embeddings: Tensor,
    labels: Tensor,
    teacher: Teacher | None = None,
    process_group: ProcessGroup | None = None,
    class_weights: Tensor | None = None,
    memory: Memory | None = None,
    temperature: Tensor | None = None,
) -> Tensor | None:
    """L_scl, L_acl or L_aclcl [E] of representations [E, N, d]; None for the objective ce.

    The other arguments are those of `exit_losses`, and
        temperature: in place of the option, a tensor as the losses of the kernels take it.
    """
    if options.objective == "ce":
        return None
    settings: dict[str, Any] = {
        "temperature": options.temperature if temperature is None else temperature,
        "denominator": options.denominator,
        "reduction": options.contrastive_reduction,
        "impl": options.impl,
        "process_group": process_group,
        "class_weights": class_weights,
        **contrasted_labels(labels, options.positives),
    }
    if memory is not None:
        settings["memory_embeddings"] = memory.embeddings.to(samples.dtype)
        settings["memory_labels"] = memory.labels
    with part(CONTRASTIVE_LOSS):
        if options.objective == "scl":
            return supcon_loss(samples, **settings)
        if teacher is not None and options.cross_layer:
            constants = (teacher.embeddings.to(samples.dtype), teacher.label_embeddings)
            names = ("teacher_embeddings", "teacher_label_embeddings")
            settings |= dict(zip(names, constants, strict=True))
            return acl_cl_loss(samples, label_embeddings=label_embeddings, **settings)
        return acl_loss(samples, label_embeddings=label_embeddings, **settings)


def distillation(
    logits: Tensor, teacher_logits: Tensor, temperature: float, several: bool = False
) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) [E], averaged over the samples.

    logits [E, N, K], teacher_logits [N, K]. several: labels have probabilities of their own, and
    the divergence is the mean of that of each (sigmoid in place of softmax).

    Source: Hinton et al. 2015, arXiv 1503.02531.
    """
    if several:
        wanted = torch.sigmoid(teacher_logits / temperature).expand_as(logits)
        entropy = torch.special.entr(wanted) + torch.special.entr(1 - wanted)
        divergence = -entropy + functional.binary_cross_entropy_with_logits(
            logits / temperature, wanted, reduction="none"
        )
        return temperature**2 * divergence.mean(dim=(1, 2))
    student = functional.log_softmax(logits / temperature, dim=-1)
    wanted = functional.log_softmax(teacher_logits / temperature, dim=-1)
    divergence = functional.kl_div(
        student, wanted.expand_as(student), reduction="none", log_target=True
    )
    return temperature**2 * divergence.sum(dim=-1).mean(dim=-1)


def count_not_finite(output: MultiExitOutput) -> Tensor:
    """Samples with a NaN or infinite value in their representation, per exit: [E] int64."""
    return (~torch.isfinite(output.exit_embeddings).all(dim=-1)).sum(dim=1)


def check_finite(counts: Sequence[float], num_samples: int, step: int) -> None:
    """Refuse to train on NaN or infinite representations.

    Args:
        counts: per exit, how many of the `num_samples` representations are not finite.

    Raises:
        FloatingPointError: naming the exit, the number of bad samples and the step.
    """
    for index, count in enumerate(counts, start=1):
        if count:
            raise FloatingPointError(
                f"Step {step}: the representations of {count:g} of {num_samples} samples at exit "
                f"{index} of {len(counts)} are NaN or infinite. A lower learning_rate, "
                "max_grad_norm=1, or bf16 instead of fp16 usually helps."
            )
