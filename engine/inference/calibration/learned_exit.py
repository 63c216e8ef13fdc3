"""The learned exit: one linear layer that says how likely an exit's answer is right.

It is fitted on texts that the exits were not trained on: on their training texts the exits are
right far more often than elsewhere, and the layer would learn to trust them too much.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor, nn

from ...model.early_exit import certainty_of
from .readings import ExitReadings

NUM_FOLDS = 5


def fold_of(labels: Tensor, num_folds: int, seed: int = 0) -> Tensor:
    """A fold 0 … num_folds - 1 for each text: int64 [n]; every class is spread over all of them.

    Raises:
        ValueError: there are fewer texts than folds.
    """
    if len(labels) < num_folds:
        raise ValueError(f"{len(labels)} texts cannot be cross-fitted in {num_folds} folds.")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]
    folds = torch.empty_like(labels)
    folds[order] = torch.arange(len(labels)) % num_folds
    return folds


def fit_learned_exit(readings: ExitReadings, regularization: float = 1.0) -> nn.Linear:
    """The learned exit of these texts: one linear layer for all exits but the last, on the CPU.

    From an exit's representation h to the log odds that the exit's answer is right, by logistic
    regression on standardised h with an L2 penalty (BERxiT fits a square loss during training; ours
    comes after it). Where every answer is right, or none, it is a constant.
    """
    from sklearn.linear_model import LogisticRegression

    embeddings = _embeddings(readings)
    is_right = _is_right(readings).flatten().numpy()
    head = nn.Linear(embeddings.shape[-1], 1)
    if is_right.all() or not is_right.any():
        # Laplace's rule: certain, but no more than so many texts allow.
        odds = (is_right.sum() + 1) / ((~is_right).sum() + 1)
        weight, bias = np.zeros(embeddings.shape[-1]), np.log([odds])
    else:
        inputs = embeddings.flatten(0, 1).numpy().copy()
        mean, deviation = inputs.mean(axis=0), inputs.std(axis=0)
        deviation[deviation == 0] = 1
        inputs -= mean
        inputs /= deviation
        fitted = LogisticRegression(C=1 / regularization, max_iter=1000).fit(inputs, is_right)
        # The standardisation becomes part of the layer.
        weight = fitted.coef_[0] / deviation
        bias = fitted.intercept_ - weight @ mean
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        head.bias.copy_(torch.from_numpy(bias))
    return head


def cross_fitted(readings: ExitReadings, num_folds: int = NUM_FOLDS) -> ExitReadings:
    """The readings with certainties of which none comes from a layer fitted on its own text.

    Raises:
        ValueError: fewer texts than folds, or readings without embeddings.
    """
    folds = fold_of(readings.labels, num_folds)
    certainties = torch.empty(_embeddings(readings).shape[:2])
    for fold in range(num_folds):
        head = fit_learned_exit(readings.subset(folds != fold))
        here = folds == fold
        certainties[:, here] = _certainties(head, readings.subset(here))
    return dataclasses.replace(readings, certainties=certainties)


def judged_by(head: nn.Linear, readings: ExitReadings) -> ExitReadings:
    """The readings with the certainties that a learned exit has on them."""
    return dataclasses.replace(readings, certainties=_certainties(head, readings))


def with_learned_exit(readings: ExitReadings) -> ExitReadings:
    """Put a learned exit into the model; the readings with cross-fitted certainties.

    The model's is fitted on all texts. Thresholds for it are chosen on the certainties that are
    returned: those of the model's own layer on these texts would be too good.

    Raises:
        ValueError: exits that are right (or wrong) on every text, fewer texts than folds, or
            readings without embeddings.
    """
    is_right = _is_right(readings)
    if is_right.all() or not is_right.any():
        raise ValueError(
            f"The exits are {'right' if is_right.all() else 'wrong'} on all {len(readings)} texts: "
            "there is nothing to learn. Use texts that the exits were not trained on."
        )
    found = cross_fitted(readings)
    model = readings.model
    model.learned_exit = fit_learned_exit(readings).to(model.device)
    model.config.learned_exit = True
    return found


def _is_right(readings: ExitReadings) -> Tensor:
    """Whether each exit but the last answers right: bool [E - 1, n]."""
    return readings.logits[:-1].argmax(dim=-1) == readings.labels


@torch.no_grad()
def _certainties(head: nn.Linear, readings: ExitReadings) -> Tensor:
    return certainty_of(head, _embeddings(readings))


def _embeddings(readings: ExitReadings) -> Tensor:
    if readings.embeddings is None:
        raise ValueError("The readings have no embeddings: use read_exits(keep_embeddings=True).")
    return readings.embeddings
