"""The losses of an optimizer step: its micro-batches, and the part of each process in them.

A micro-batch has `per_device_train_batch_size` texts per process. W processes see the batches that
one process would see with W times that size, so they train alike.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backends.interface import Backend, StepReport
from ..data.batching import collate
from ..model.answers import IGNORED
from ..objectives.large_batches import Chunk, cached_losses
from ..objectives.losses import ExitLosses, count_not_finite
from ..objectives.memory import MemoryBank
from ..runtime import collectives, processes
from ..runtime.profiler_marks import DATA, FORWARD, part
from .builder import RunParts
from .feature_cache import FeatureCache
from .forward.dropout import fast_dropout
from .forward.padding import KnownPadding
from .stages import Stage, stage_outputs
from .transfers import to_device


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
        self.class_weights: Tensor | None = None
        self.weight_of_class: dict[str, float] = {}
        if parts.class_weights is not None:
            named = zip(parts.data.label_names, parts.class_weights, strict=True)
            self.weight_of_class = dict(named)
            self.class_weights = torch.tensor(parts.class_weights, device=parts.device)
        self.temperature = parts.temperature
        self.memory: MemoryBank | None = None
        options = self.config.objective
        # The configuration refuses it where several exits are trained with the backbone.
        if options.objective != "ce" and options.memory_size and stage.trains_backbone:
            exit_: Any = self.model.exits[-1]
            width = exit_.classifier.in_features
            self.memory = MemoryBank(options.memory_size, width, device=self.device)
        # Representations that were not finite in the step so far, per exit, and their number.
        self.num_not_finite: list[Tensor] = []
        self.num_samples = 0

    def of(self, epoch: int, step: int, window: Sequence[np.ndarray]) -> Iterator[ExitLosses]:
        """The losses of a step's micro-batches, to be back-propagated one after another.

        epoch, step: of the stage, 1 is the first.
        window: the rows of each micro-batch in the training split, those of all processes.
        """
        self.num_not_finite, self.num_samples = [], 0
        positions = self.stage.exits_in_epoch(epoch)
        is_global = self.config.optimization.negatives == "global"
        num_texts = sum(map(len, window))
        together = self.config.chunks_together
        for start in range(0, len(window), together):
            chunks = window[start : start + together]
            # Every W-th text, so that all parts of texts sorted by length take equally long.
            parts = [rows[processes.rank() :: processes.world_size()] for rows in chunks]
            shares = [len(own) / num_texts for own in parts]
            # If a micro-batch has fewer texts than there are processes, some have none. They take
            # part with a stand-in text that counts in no loss, because every process must exchange
            # gradients as often as the others.
            forwards = [
                partial(self._forward, positions, own if len(own) else rows[:1], len(own) == 0)
                for own, rows in zip(parts, chunks, strict=True)
            ]
            # With global negatives each process has the whole loss of the contrastive batch, else
            # that of its part.
            weight = sum(shares)
            if is_global:
                weight = sum(map(len, chunks)) / num_texts / processes.world_size()
            yield from cached_losses(
                forwards,
                partial(self.model.label_embeddings_of, positions),
                self.config.objective,
                shares=shares,
                weight=weight,
                loss_scale=self.backend.loss_scale,
                device=self.device,
                context=self.backend.forward_context,
                process_group=collectives.group() if is_global else None,
                class_weights=self.class_weights,
                memory=self.memory,
                reads_memory=step > self.config.objective.memory_warmup_steps,
                temperature=self.temperature,
            )

    def learn(self, epoch: int, report: StepReport) -> dict[str, Tensor]:
        """Update what the objective itself learns; return name -> value [], as the step used it."""
        if self.temperature is None:
            return {}
        used = {"temperature": self.temperature.value}
        weights = torch.full((1,), self.config.objective.aux_weight, device=self.device)
        if report.decision is not None:
            weights = weights * self.stage.kept_exits(epoch, report.decision.kept).to(weights)
        self.temperature.step(weights, report.skipped)
        return used

    def results(self) -> dict[str, Any]:
        """Entries for results.json: the learned temperature, and the weights of the classes."""
        found: dict[str, Any] = {}
        if self.temperature is not None:
            found["temperature"] = float(self.temperature.value)
        if self.weight_of_class:
            found["class_weights"] = self.weight_of_class
        return found

    def state_dict(self) -> dict[str, Any]:
        """Everything kept from step to step; each process has its own memory."""
        kept = {"memory": self.memory, "temperature": self.temperature}
        return {name: None if part is None else part.state_dict() for name, part in kept.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict` of the same process and stage."""
        if self.memory is not None:
            self.memory.load_state_dict(state["memory"])
        if self.temperature is not None:
            self.temperature.load_state_dict(state["temperature"])

    @part(FORWARD)
    def _forward(self, positions: tuple[int, ...], rows: np.ndarray, is_stand_in: bool) -> Chunk:
        """Outputs of the trained exits, and of their teacher, for some training texts."""
        states = None
        known_padding: AbstractContextManager[Any] = nullcontext()
        compiled = self.config.optimization.torch_compile
        with part(DATA):
            if self.features is None:
                batch = collate(self.encoded, rows, self.pad_token_id)
                batch = {name: to_device(value, self.device) for name, value in batch.items()}
                labels = batch.pop("labels")
                offsets = self.encoded.offsets
                is_full = len(set(offsets[rows + 1] - offsets[rows])) == 1
                # A compiled encoder does not ask.
                if not compiled:
                    known_padding = KnownPadding(batch["attention_mask"], is_full)
            else:
                assert self.encoded.labels is not None
                labels = to_device(self.encoded.labels[rows], self.device)
                dtype = next(self.model.exits.parameters()).dtype
                states, mask = self.features.batch(rows, self.device, dtype)
                batch = {"attention_mask": mask}
        dropout = fast_dropout(self.device, compiled)
        with self.backend.forward_context(), known_padding, dropout:
            output, teacher = stage_outputs(self.model, self.stage, positions, batch, states)
        # A large batch runs the model twice on each chunk, the first time without a graph.
        if torch.is_grad_enabled():
            self.num_not_finite.append(count_not_finite(output))
            self.num_samples += len(rows)
        if is_stand_in:
            labels = torch.full(labels.shape, IGNORED, device=labels.device)
        return Chunk(output, labels, teacher, is_stand_in)
