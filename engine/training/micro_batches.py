"""The losses of an optimizer step: its micro-batches, and each process's part of them.

A micro-batch has `per_device_train_batch_size` texts for every process. W processes see the batches
that one process would see with W times that size, so they train alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..backends.interface import Engine
from ..config.training import TrainingConfig
from ..data.batching import EncodedSplit, collate
from ..model.multi_exit import MultiExitForSequenceClassification
from ..objectives.large_batches import Chunk, cached_losses
from ..objectives.losses import IGNORED, ExitLosses, check_finite, exit_losses
from ..runtime import collectives, processes
from ..runtime.profiler_marks import DATA, FORWARD, part
from .feature_cache import FeatureCache
from .stages import Stage, stage_outputs, stage_states


@dataclass(frozen=True)
class Part:
    """The texts of a micro-batch that are this process's: their rows in the training split.

    A micro-batch with fewer texts than processes leaves some with none; they take part with a text
    whose label is `IGNORED`, because every process must exchange gradients as often as the others.
    """

    rows: np.ndarray
    is_stand_in: bool

    def __len__(self) -> int:
        return 0 if self.is_stand_in else len(self.rows)


def own_part(rows: np.ndarray) -> Part:
    """Every W-th text: parts of texts that are sorted by length take equally long."""
    own = rows[processes.rank() :: processes.world_size()]
    return Part(own, False) if len(own) else Part(rows[:1], True)


class StepLosses:
    """Runs the model on the micro-batches of a step and gives their losses, weighted.

    The sum over micro-batches and processes of what is given is the loss of the step: each
    cross-entropy weighs the share of its texts, each contrastive loss that of its batch's.

    Args:
        stage: what is trained; engine: whose precision the model runs in; features: the backbone's
            states, where they are read instead of computed.
    """

    def __init__(
        self,
        model: MultiExitForSequenceClassification,
        stage: Stage,
        config: TrainingConfig,
        encoded: EncodedSplit,
        engine: Engine,
        *,
        pad_token_id: int,
        device: torch.device,
        features: FeatureCache | None = None,
    ) -> None:
        self.model = model
        self.stage = stage
        self.config = config
        self.encoded = encoded
        self.engine = engine
        self.pad_token_id = pad_token_id
        self.device = device
        self.features = features

    def of(self, epoch: int, step: int, window: Sequence[np.ndarray]) -> Iterator[ExitLosses]:
        """The losses of a step's micro-batches, to be back-propagated one after another.

        `window`: rows of the training split, of all processes, for each micro-batch.
        """
        positions = self.stage.exits_in_epoch(epoch)
        num_samples = sum(map(len, window))
        together = self.config.chunks_together
        for start in range(0, len(window), together):
            rows = window[start : start + together]
            parts = [own_part(of_chunk) for of_chunk in rows]
            yield from self._contrasted(
                positions,
                [partial(self._forward, positions, step, own) for own in parts],
                [len(own) / num_samples for own in parts],
                sum(map(len, rows)) / num_samples,
            )

    def _contrasted(
        self,
        positions: tuple[int, ...],
        forwards: Sequence[partial[Chunk]],
        shares: Sequence[float],
        share: float,
    ) -> Iterator[ExitLosses]:
        """The losses of the chunks of one contrastive batch.

        `shares`: of the step's texts, in each chunk here; `share`: in the chunks of all processes.
        """
        # Locally contrasted, a batch is this process's; globally, each process has all of its loss.
        is_global = self.config.optimization.negatives == "global"
        weight = share / processes.world_size() if is_global else sum(shares)

        def label_embeddings() -> Tensor:
            return self.model.label_embeddings_of(positions)

        if len(forwards) > 1:
            yield from cached_losses(
                forwards,
                label_embeddings,
                self.config.objective,
                shares=shares,
                weight=weight,
                loss_scale=self.engine.loss_scale,
                device=self.device,
                context=self.engine.forward_context,
                process_group=self._group(is_global),
            )
            return
        chunk = forwards[0]()
        with self.engine.forward_context():
            losses = exit_losses(
                self.config.objective,
                chunk.output,
                label_embeddings(),
                chunk.labels,
                chunk.teacher,
                process_group=self._group(is_global),
            )
        yield losses.times(shares[0], weight)

    def _group(self, is_global: bool) -> torch.distributed.ProcessGroup | None:
        return collectives.group() if is_global else None

    @part(FORWARD)
    def _forward(self, positions: tuple[int, ...], step: int, own: Part) -> Chunk:
        """Outputs of the trained exits, and of their teacher, for some training texts."""
        if self.features is not None:
            with part(DATA):
                states, mask = self.features.batch(own.rows, self.device)
                assert self.encoded.labels is not None
                labels = self.encoded.labels[own.rows].to(self.device)
        else:
            with part(DATA):
                batch = collate(self.encoded, own.rows, self.pad_token_id)
                batch = {name: value.to(self.device) for name, value in batch.items()}
            labels, mask = batch.pop("labels"), batch["attention_mask"]
            with self.engine.forward_context():
                states = stage_states(self.model, self.stage, positions, batch)
        with self.engine.forward_context():
            output, teacher = stage_outputs(self.model, self.stage, positions, states, mask)
        check_finite(output, step)
        if own.is_stand_in:
            labels = torch.full_like(labels, IGNORED)
        return Chunk(output, labels, teacher)
