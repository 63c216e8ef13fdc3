"""What labelled texts show at every exit, from one pass: all that early exit is calibrated on."""

from __future__ import annotations

import dataclasses
import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...data.batching import EncodedSplit, collate, epoch_batches
from ...model.early_exit import certainty_of, check_has_earlier_exits
from ...model.exit_policies import ExitReading
from ...runtime.device import autocast
from ..evaluation import score
from ..logits import check_finite

if TYPE_CHECKING:
    from ...model.multi_exit import MultiExitForSequenceClassification

logger = logging.getLogger("fusedacl")


@dataclass(frozen=True)
class ExitReadings:
    """What n labelled texts showed at each of E exits, and what each exit costs; on the CPU.

    logits [E, n, K] float32; labels [n]; lengths [n] in tokens; exit_layers: E layers, ascending.
    certainties [E - 1, n]: the learned exit's on all exits but the last, None without one;
    embeddings [E - 1, n, d]: what it reads, None where they were not kept.
    """

    logits: Tensor
    labels: Tensor
    lengths: Tensor
    exit_layers: list[int]
    certainties: Tensor | None
    model: MultiExitForSequenceClassification
    embeddings: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, rows: Tensor) -> ExitReadings:
        """The readings of some texts: `rows` are their places, or a mask [n]."""
        certainties, embeddings = self.certainties, self.embeddings
        return dataclasses.replace(
            self,
            logits=self.logits[:, rows],
            labels=self.labels[rows],
            lengths=self.lengths[rows],
            certainties=None if certainties is None else certainties[:, rows],
            embeddings=None if embeddings is None else embeddings[:, rows],
        )

    def at(self, index: int) -> ExitReading:
        """What the texts showed at one exit, by its place in `exit_layers`."""
        is_last = index == len(self.exit_layers) - 1
        # Nobody asks how sure the last exit is.
        certainty = None if self.certainties is None or is_last else self.certainties[index]
        return ExitReading(self.exit_layers[index], self.logits[index], certainty)

    def score(self, metric: str, predictions: Tensor | None = None) -> float:
        """The metric of predicted classes [n]; of the full model without them."""
        if predictions is None:
            predictions = self.logits[-1].argmax(dim=-1)
        return score([metric], predictions.numpy(), self.labels.numpy())[metric]


@torch.no_grad()
def read_exits(
    model: MultiExitForSequenceClassification,
    encoded: EncodedSplit,
    batch_size: int,
    *,
    pad_token_id: int,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
    keep_embeddings: bool = False,
) -> ExitReadings:
    """One pass of a labelled split through all exits; `keep_embeddings`: for a learned exit.

    Raises:
        ValueError: the split has no labels, or the model has one exit.
        FloatingPointError: an exit's logits are NaN or infinite.
    """
    check_has_earlier_exits(model)
    labels = _labels(encoded)
    if keep_embeddings:
        shape = (len(model.exit_layers) - 1, len(encoded), model.label_embeddings.shape[-1])
        logger.info(
            f"learned exit: {shape[0]} exits x {shape[1]} texts x {shape[2]} numbers, "
            f"{4 * math.prod(shape) / 2**20:.0f} MiB of memory"
        )
    logits, certainties, embeddings = _pass(
        model, encoded, batch_size, pad_token_id, dtype, progress, keep_embeddings
    )
    check_finite(logits, model.exit_layers)
    return ExitReadings(
        logits=logits,
        labels=labels,
        lengths=torch.from_numpy(encoded.lengths),
        exit_layers=list(model.exit_layers),
        certainties=certainties,
        model=model,
        embeddings=embeddings,
    )


@torch.no_grad()
def _pass(
    model: MultiExitForSequenceClassification,
    encoded: EncodedSplit,
    batch_size: int,
    pad_token_id: int,
    dtype: torch.dtype,
    progress: bool,
    keep_embeddings: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Logits [E, n, K], certainties [E, n] and the earlier exits' embeddings [E - 1, n, d]."""
    device = model.device
    num_exits, num_rows = len(model.exit_layers), len(encoded)
    learned_exit: nn.Linear | None = getattr(model, "learned_exit", None)
    logits = torch.empty(num_exits, num_rows, model.num_labels)
    certainties = None if learned_exit is None else torch.empty(num_exits - 1, num_rows)
    embeddings = None
    if keep_embeddings:
        embeddings = torch.empty(num_exits - 1, num_rows, model.label_embeddings.shape[-1])
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        batches = epoch_batches(
            encoded.lengths, batch_size, seed=0, epoch=0, shuffle=False, group_by_length=True
        )
        for indices in tqdm(batches, desc="exits", leave=False, disable=None if progress else True):
            batch = collate(encoded, indices, pad_token_id)
            batch.pop("labels", None)
            with autocast(device, dtype):
                output = model(**{name: value.to(device) for name, value in batch.items()})
            rows = torch.from_numpy(indices)
            logits[:, rows] = output.exit_logits.float().cpu()
            if learned_exit is not None and certainties is not None:
                certainties[:, rows] = certainty_of(learned_exit, output.exit_embeddings[:-1]).cpu()
            if embeddings is not None:
                embeddings[:, rows] = output.exit_embeddings[:-1].float().cpu()
    finally:
        for module in trained:
            module.training = True
    return logits, certainties, embeddings


def _labels(encoded: EncodedSplit) -> Tensor:
    if encoded.labels is None:
        raise ValueError("The split has no labels: early exit is calibrated on labelled texts.")
    return encoded.labels
