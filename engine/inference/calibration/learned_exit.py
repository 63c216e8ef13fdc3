"""The learned exit: a linear layer that predicts the probability that an exit's answer is right.

It is fitted on texts that the exits were not trained on: on their training texts the exits are
right far more often, and the layer would overestimate them.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor, nn

from ...model.answers import same_answers
from ...model.early_exit import certainty_of
from .readings import ExitReadings

NUM_FOLDS = 5


def fold_of(labels: Tensor, num_folds: int, seed: int = 0) -> Tensor:
    """The fold of each text, 0 … num_folds - 1, stratified by class: int64 [n].

    labels [n], or [n, K] where a text may have several: then stratified by their number.

    Raises:
        ValueError: there are fewer texts than folds.
    """
    if len(labels) < num_folds:
        raise ValueError(f"{len(labels)} texts cannot be cross-fitted in {num_folds} folds.")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    strata = labels.sum(dim=-1) if labels.dim() == 2 else labels
    order = order[strata[order].argsort(stable=True)]
    folds = torch.empty_like(strata)
    folds[order] = torch.arange(len(labels)) % num_folds
    return folds


def fit_learned_exit(readings: ExitReadings) -> nn.Linear:
    """Fit a learned exit: one linear layer for all exits but the last, on the CPU.

    It maps an exit's representation h to the log odds that the exit's answer is right: logistic
    regression on standardised h with an L2 penalty, after training (BERxiT fits a square loss
    during training). If all answers are right, or all wrong, it is a constant.
    """
    from sklearn.linear_model import LogisticRegression

    embeddings = _embeddings(readings)
    is_right = _is_right(readings).flatten().numpy()
    head = nn.Linear(embeddings.shape[-1], 1)
    if is_right.all() or not is_right.any():
        # Laplace's rule of succession: probabilities stay below 1.
        odds = (is_right.sum() + 1) / ((~is_right).sum() + 1)
        weight, bias = np.zeros(embeddings.shape[-1]), np.log([odds])
    else:
        inputs = embeddings.flatten(0, 1).numpy().copy()
        mean, deviation = inputs.mean(axis=0), inputs.std(axis=0)
        deviation[deviation == 0] = 1
        inputs -= mean
        inputs /= deviation
        fitted = LogisticRegression(max_iter=1000).fit(inputs, is_right)
        # The layer includes the standardisation.
        weight = fitted.coef_[0] / deviation
        bias = fitted.intercept_ - weight @ mean
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        head.bias.copy_(torch.from_numpy(bias))
    return head


def cross_fitted(readings: ExitReadings) -> ExitReadings:
    """The readings with cross-fitted certainties: each from a layer fitted on the other folds.

    Raises:
        ValueError: fewer texts than folds, or readings without embeddings.
    """
    folds = fold_of(readings.labels, NUM_FOLDS)
    certainties = torch.empty(_embeddings(readings).shape[:2])
    for fold in range(NUM_FOLDS):
        head = fit_learned_exit(readings.subset(folds != fold))
        here = folds == fold
        certainties[:, here] = _certainties(head, readings.subset(here))
    return dataclasses.replace(readings, certainties=certainties)


def judged_by(head: nn.Linear, readings: ExitReadings) -> ExitReadings:
    """The readings with the certainties of a learned exit."""
    return dataclasses.replace(readings, certainties=_certainties(head, readings))


def with_learned_exit(readings: ExitReadings) -> ExitReadings:
    """Give the model a learned exit; returns the readings with cross-fitted certainties.

    The model's layer is fitted on all texts. Its thresholds are chosen on the returned certainties,
    because those of a layer on the texts it was fitted on are too good.

    Raises:
        ValueError: the exits are right (or wrong) on every text, there are fewer texts than folds,
            or the readings have no embeddings.
    """
    _check_learnable(readings)
    found = cross_fitted(readings)
    _give(readings, fit_learned_exit(readings))
    return found


def with_separate_learned_exit(readings: ExitReadings) -> ExitReadings:
    """Give the model a learned exit fitted on half of the texts; returns the readings of the other.

    A guarantee needs texts that the layer was not fitted on.

    Raises:
        ValueError: as `with_learned_exit`.
    """
    _check_learnable(readings)
    fitted_on = fold_of(readings.labels, 2) == 0
    head = fit_learned_exit(readings.subset(fitted_on))
    _give(readings, head)
    return judged_by(head, readings.subset(~fitted_on))


def _check_learnable(readings: ExitReadings) -> None:
    is_right = _is_right(readings)
    if is_right.all() or not is_right.any():
        raise ValueError(
            f"The exits are {'right' if is_right.all() else 'wrong'} on all {len(readings)} texts: "
            "there is nothing to learn. Use texts that the exits were not trained on."
        )


def _give(readings: ExitReadings, head: nn.Linear) -> None:
    """Make a layer the learned exit of the readings' model."""
    model = readings.model
    model.learned_exit = head.to(model.device)
    model.config.learned_exit = True


def _is_right(readings: ExitReadings) -> Tensor:
    """True where the answer of an exit but the last is right: bool [E - 1, n]."""
    return same_answers(readings.answers[:-1], readings.labels, readings.several)


@torch.no_grad()
def _certainties(head: nn.Linear, readings: ExitReadings) -> Tensor:
    return certainty_of(head, _embeddings(readings))


def _embeddings(readings: ExitReadings) -> Tensor:
    if readings.embeddings is None:
        raise ValueError("The readings have no embeddings: use read_exits(keep_embeddings=True).")
    return readings.embeddings
