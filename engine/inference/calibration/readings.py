"""Outputs of all exits for a labelled split, on which early exit is calibrated."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...data.batching import EncodedSplit
from ...model.answers import answers_of
from ...model.early_exit import certainty_of, check_has_earlier_exits
from ...model.exit_policies import ExitReading
from ...model.saved import record_of
from ..evaluation import score
from ..logits import check_finite, exit_outputs

if TYPE_CHECKING:
    from ...model.multi_exit import MultiExitForSequenceClassification

logger = logging.getLogger("fusedacl")


@dataclass(frozen=True)
class ExitReadings:
    """Outputs of E exits for n labelled texts, on the CPU.

    logits [E, n, K] float32; labels [n], or bool [n, K] where a text may have several; lengths [n]
    in tokens; exit_layers: E layers, ascending.
    certainties [E - 1, n]: output of the learned exit at all exits but the last, None without one;
    embeddings [E - 1, n, d]: input of the learned exit, None if not kept.
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
        """The readings of some texts; `rows`: their indices, or a mask [n]."""
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
        """The readings of one exit, by its position in `exit_layers`."""
        is_last = index == len(self.exit_layers) - 1
        # No policy reads the certainty of the last exit.
        certainty = None if self.certainties is None or is_last else self.certainties[index]
        return ExitReading(self.exit_layers[index], self.logits[index], certainty, self.several)

    @property
    def several(self) -> bool:
        """True if a text may have several labels."""
        return self.labels.dim() == 2

    @property
    def answers(self) -> Tensor:
        """The classes that the exits answer, [E, n], or the labels that apply, [E, n, K]."""
        return answers_of(self.logits, self.several)

    def answers_at(self, exits: Tensor) -> Tensor:
        """The answer to each text of the exit at its position in `exits` [n]."""
        texts = torch.arange(len(self))
        return answers_of(self.logits[exits, texts], self.several)

    def score(self, metric: str, predictions: Tensor | None = None) -> float:
        """The metric of the answers to the texts; None: those of the full model."""
        if predictions is None:
            predictions = self.answers[-1]
        f1_index = record_of(self.model).f1_index
        return score([metric], predictions.numpy(), self.labels.numpy(), f1_index)[metric]


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
    """Run a labelled split once through all exits; `keep_embeddings`: for fitting a learned exit.

    Raises:
        ValueError: the split has no labels, or the model has one exit.
        FloatingPointError: an exit's logits are NaN or infinite.
    """
    check_has_earlier_exits(model)
    if encoded.labels is None:
        raise ValueError("The split has no labels: early exit is calibrated on labelled texts.")
    num_earlier, num_rows = len(model.exit_layers) - 1, len(encoded)
    learned_exit: nn.Linear | None = getattr(model, "learned_exit", None)
    logits = torch.empty(num_earlier + 1, num_rows, model.num_labels)
    certainties = None if learned_exit is None else torch.empty(num_earlier, num_rows)
    embeddings = None
    if keep_embeddings:
        embeddings = torch.empty(num_earlier, num_rows, model.label_embeddings.shape[-1])
        logger.info(
            f"learned exit: {num_earlier} exits x {num_rows} texts x {embeddings.shape[-1]} "
            f"numbers, {embeddings.nbytes / 2**20:.0f} MiB of memory"
        )
    outputs = exit_outputs(
        model,
        encoded,
        batch_size,
        pad_token_id=pad_token_id,
        dtype=dtype,
        progress="exits" if progress else None,
    )
    for rows, output in outputs:
        logits[:, rows] = output.exit_logits.float().cpu()
        earlier = output.exit_embeddings[:-1]
        if learned_exit is not None and certainties is not None:
            certainties[:, rows] = certainty_of(learned_exit, earlier).cpu()
        if embeddings is not None:
            embeddings[:, rows] = earlier.float().cpu()
    check_finite(logits, model.exit_layers)
    return ExitReadings(
        logits=logits,
        labels=encoded.labels,
        lengths=torch.from_numpy(encoded.lengths),
        exit_layers=list(model.exit_layers),
        certainties=certainties,
        model=model,
        embeddings=embeddings,
    )
