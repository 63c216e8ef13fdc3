"""Contrastive batches that are larger than one forward pass can hold (GradCache).

The contrastive loss needs the representations of all its samples at once, but not the graph of the
backbone. First the representations are computed chunk by chunk, without a graph; then the loss and
its gradient with respect to them; then each chunk again, with a graph, through which that gradient
is back-propagated. The second pass draws the random numbers of the first, so that dropout is the
same. This takes the memory of one chunk, and the time of one more forward pass.

The gradient for a temperature that is learned is taken with that of the representations, in batches
of one chunk too: however the losses are back-propagated later, it is computed once.

Source: Gao et al. 2021, arXiv 2101.06983.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..config.sections import ObjectiveOptions
from ..model.multi_exit import MultiExitOutput
from ..runtime.profiler_marks import CONTRASTIVE_BACKWARD, part
from .losses import ExitLosses, Memory, Teacher, contrastive_loss, exit_losses, main_losses
from .memory import MemoryBank
from .temperature import LearnedTemperature


@dataclass(frozen=True)
class Chunk:
    """Outputs of E exits on N samples, their labels, and the teacher.

    is_stand_in: the sample counts in no loss, and enters no memory.
    """

    output: MultiExitOutput
    labels: Tensor
    teacher: Teacher | None
    is_stand_in: bool = False


def cached_losses(
    forwards: Sequence[Callable[[], Chunk]],
    label_embeddings: Callable[[], Tensor],
    options: ObjectiveOptions,
    *,
    shares: Sequence[float],
    weight: float,
    loss_scale: Tensor | float,
    device: torch.device,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    process_group: ProcessGroup | None = None,
    class_weights: Tensor | None = None,
    memory: MemoryBank | None = None,
    reads_memory: bool = True,
    temperature: LearnedTemperature | None = None,
) -> Iterator[ExitLosses]:
    """The losses of each chunk of one contrastive batch, to be back-propagated one after another.

    Summed over the chunks, the auxiliary losses and their gradients are `weight` times the
    contrastive loss of the whole batch and its gradient. A single chunk needs no second pass.

    Args:
        forwards: one per chunk, runs the model on it; several are called twice each, with the same
            random numbers.
        label_embeddings: returns the weights of the classifiers [E, K, d].
        shares: factors of the chunks' main losses.
        weight: factor of the contrastive loss.
        loss_scale: factor that the losses will carry in float16. The gradient that is kept between
            the passes carries it too, and so does not underflow.
        context: for the contrastive loss, and to read the weights of the model.
        process_group, class_weights: as for `exit_losses`.
        memory: gets the samples of the batch, those of its last exit, after their loss.
        reads_memory: whether the batch is contrasted with the samples that the memory has before.
        temperature: takes the place of the option, and gets its gradient.
    """
    rows = None
    if memory is not None and reads_memory:
        rows = Memory(memory.embeddings, memory.labels)
    only = forwards[0]() if len(forwards) == 1 else None
    if only is not None and temperature is None:
        with context():
            losses = exit_losses(
                options, only.output, label_embeddings(), only.labels, only.teacher, process_group,
                class_weights, rows,
            )  # fmt: skip
        _remember(memory, [only])
        yield losses.times(shares[0], weight)
        return
    before, seen = [], [] if only is None else [only]
    if only is None:
        with torch.no_grad():
            for forward in forwards:
                before.append(_random_state(device))
                seen.append(forward())
    samples = torch.cat([chunk.output.exit_embeddings for chunk in seen], dim=1)
    samples = samples.detach().requires_grad_()
    inputs = [samples]
    with context():
        inputs.append(label_embeddings().detach().clone().requires_grad_())
        tau = None
        if temperature is not None:
            num_exits, num_samples = samples.shape[:2]
            leaves, tau = temperature.of_exits(num_exits, num_samples, process_group is not None)
            inputs.append(leaves)
        value = contrastive_loss(
            options,
            samples,
            inputs[1],
            torch.cat([chunk.labels for chunk in seen]),
            _join([chunk.teacher for chunk in seen]),
            process_group,
            class_weights,
            rows,
            tau,
        )
    assert value is not None  # the configuration refuses such batches without a contrastive term
    with part(CONTRASTIVE_BACKWARD):
        of_samples, of_weights, *of_leaves = torch.autograd.grad(
            (loss_scale * value).sum(), inputs, allow_unused=True
        )
    if temperature is not None:
        # Every process has one, because they are added up.
        found = torch.zeros_like(leaves) if of_leaves[0] is None else of_leaves[0]
        temperature.add_gradient(weight * found / loss_scale)
    _remember(memory, seen)
    value = value.detach()
    start = 0
    for index, forward in enumerate(forwards):
        if only is None:
            _set_random_state(before[index], device)
        chunk = forward() if only is None else only
        embeddings = chunk.output.exit_embeddings  # [E, N, d]
        stop = start + embeddings.shape[1]
        linked = _product(embeddings, of_samples[:, start:stop])
        if index == 0 and of_weights is not None:
            with context():
                linked = linked + _product(label_embeddings(), of_weights)
        linked = linked / loss_scale
        main, cross_entropy = main_losses(
            options, chunk.output, chunk.labels, chunk.teacher, class_weights
        )
        # Has the gradient of `linked`, and as its value an equal part of the loss.
        auxiliary = linked - linked.detach() + value / len(forwards)
        yield ExitLosses(main, auxiliary, cross_entropy).times(shares[index], weight)
        start = stop


def _remember(memory: MemoryBank | None, chunks: Sequence[Chunk]) -> None:
    """Let the samples of a batch into the memory, in their order."""
    for chunk in chunks:
        if memory is not None and not chunk.is_stand_in:
            memory.add(chunk.output.exit_embeddings[-1], chunk.labels)


def _product(rows: Tensor, gradient: Tensor) -> Tensor:
    """Scalar products [E] of rows [E, N, d] and their gradient, in float32 at least."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return (rows.to(dtype) * gradient.to(dtype)).sum(dim=(1, 2))


def _join(teachers: Sequence[Teacher | None]) -> Teacher | None:
    """One teacher for all chunks; its label embeddings are the same in each."""
    found = [teacher for teacher in teachers if teacher is not None]
    if not found:
        return None
    embeddings, logits = (
        torch.cat([t.embeddings for t in found]),
        torch.cat([t.logits for t in found]),
    )
    return Teacher(embeddings, found[0].label_embeddings, logits)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_gpu


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    on_cpu, on_gpu = state
    torch.set_rng_state(on_cpu)
    if on_gpu is not None:
        torch.cuda.set_rng_state(on_gpu, device)
