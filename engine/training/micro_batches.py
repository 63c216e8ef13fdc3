"""The losses of an optimizer step: its micro-batches, and the part of each process in them.

A micro-batch has `per_device_train_batch_size` texts per process. W processes see the batches that
one process would see with W times that size, so they train alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..backends.interface import Backend
from ..data.batching import collate
from ..objectives.large_batches import Chunk, cached_losses
from ..objectives.losses import IGNORED, ExitLosses, count_not_finite, exit_losses
from ..runtime import collectives, processes
from ..runtime.profiler_marks import DATA, FORWARD, part
from .builder import RunParts
from .feature_cache import FeatureCache
from .padding import KnownPadding
from .stages import Stage, stage_outputs, stage_states
from .transfers import to_device


class Part(NamedTuple):
    """Rows of the training split that are the part of this process in a micro-batch.

    If a micro-batch has fewer texts than there are processes, some have none. They take part with
    a stand-in text whose label is `IGNORED`, because every process must exchange gradients as
    often as the others.
    """

    rows: np.ndarray
    is_stand_in: bool

    @property
    def num_texts(self) -> int:
        return 0 if self.is_stand_in else len(self.rows)


def own_part(rows: np.ndarray) -> Part:
    """Every W-th text, so that all parts of texts sorted by length take equally long."""
    own = rows[processes.rank() :: processes.world_size()]
    return Part(own, False) if len(own) else Part(rows[:1], True)


class StepLosses:
    """Runs the model on the micro-batches of a step and yields their losses, weighted.

    The sum over micro-batches and processes is the loss of the step: each cross-entropy is weighted
    by the share of its texts, each contrastive loss by the share of its batch.

    Args:
        stage: says what is trained.
        backend: gives the precision in which the model runs.
        features: the states of the backbone, if they are read instead of computed.
    """

    def __init__(
        self, parts: RunParts, stage: Stage, backend: Backend, features: FeatureCache | None
    ) -> None:
        self.model = parts.model
        self.stage = stage
        self.config = parts.config
        self.encoded = parts.train_split
        self.backend = backend
        self.pad_token_id = parts.tokenizer.pad_token_id
        self.device = parts.device
        self.features = features
        # Representations that were not finite in the step so far, per exit, and their number.
        self.num_not_finite: list[Tensor] = []
        self.num_samples = 0

    def of(self, epoch: int, window: Sequence[np.ndarray]) -> Iterator[ExitLosses]:
        """The losses of a step's micro-batches, to be back-propagated one after another.

        window: the rows of each micro-batch in the training split, those of all processes.
        """
        self.num_not_finite, self.num_samples = [], 0
        positions = self.stage.exits_in_epoch(epoch)
        label_embeddings = partial(self.model.label_embeddings_of, positions)
        objective, context = self.config.objective, self.backend.forward_context
        is_global = self.config.optimization.negatives == "global"
        process_group = collectives.group() if is_global else None
        num_texts = sum(map(len, window))
        together = self.config.chunks_together
        for start in range(0, len(window), together):
            chunks = window[start : start + together]
            parts = [own_part(rows) for rows in chunks]
            forwards = [partial(self._forward, positions, own) for own in parts]
            shares = [own.num_texts / num_texts for own in parts]
            # With global negatives each process has the whole loss of the contrastive batch, else
            # that of its part.
            weight = sum(shares)
            if is_global:
                weight = sum(map(len, chunks)) / num_texts / processes.world_size()
            if len(forwards) > 1:
                yield from cached_losses(
                    forwards,
                    label_embeddings,
                    objective,
                    shares=shares,
                    weight=weight,
                    loss_scale=self.backend.loss_scale,
                    device=self.device,
                    context=context,
                    process_group=process_group,
                )
                continue
            (chunk,) = (forward() for forward in forwards)
            with context():
                losses = exit_losses(
                    objective,
                    chunk.output,
                    label_embeddings(),
                    chunk.labels,
                    chunk.teacher,
                    process_group=process_group,
                )
            yield losses.times(shares[0], weight)

    @part(FORWARD)
    def _forward(self, positions: tuple[int, ...], own: Part) -> Chunk:
        """Outputs of the trained exits, and of their teacher, for some training texts."""
        context = self.backend.forward_context
        with part(DATA):
            if self.features is None:
                batch = collate(self.encoded, own.rows, self.pad_token_id)
            else:
                assert self.encoded.labels is not None
                batch = {"labels": self.encoded.labels[own.rows]}
            batch = {name: to_device(value, self.device) for name, value in batch.items()}
            labels = batch.pop("labels")
        if self.features is None:
            mask = batch["attention_mask"]
            offsets = self.encoded.offsets
            lengths = offsets[own.rows + 1] - offsets[own.rows]
            with context(), KnownPadding(mask, bool(np.ptp(lengths) == 0)):
                states = stage_states(self.model, self.stage, positions, batch)
        else:
            with part(DATA):
                states, mask = self.features.batch(own.rows, self.device)
        with context():
            output, teacher = stage_outputs(self.model, self.stage, positions, states, mask)
        # A large batch runs the model twice on each chunk, the first time without a graph.
        if torch.is_grad_enabled():
            self.num_not_finite.append(count_not_finite(output))
            self.num_samples += len(own.rows)
        if own.is_stand_in:
            labels = torch.full_like(labels, IGNORED)
        return Chunk(output, labels, teacher)
