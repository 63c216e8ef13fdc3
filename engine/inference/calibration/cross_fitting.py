"""Scores of settings on texts that they were not chosen on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...model.exit_policies import Learned
from ...model.flops import exit_flops, full_flops
from .learned_exit import cross_fitted, fit_learned_exit, fold_of, judged_by
from .readings import ExitReadings
from .search import Target, choose, policy_grid, replay, spent_flops, sweep

NUM_FOLDS = 2


@dataclass(frozen=True)
class CrossFitted:
    """Results on all texts of a split, each with the setting chosen on the other folds.

    score: the metric, as a fraction; mean_layer: layers run per text; flops_share: operations as a
    share of the full model's.
    """

    score: float
    mean_layer: float
    flops_share: float
    num_folds: int


def cross_fit(
    name: str,
    readings: ExitReadings,
    metric: str,
    target: Target,
    *,
    num_thresholds: int = 33,
) -> CrossFitted:
    """Choose a policy's setting on all folds but one, and score it on that one, for each fold.

    The learned exit is also fitted without the fold. The score of a setting on the texts that it
    was chosen on is optimistic; this one is slightly pessimistic, being chosen on fewer texts.

    Raises:
        ValueError: too few texts, or no setting reaches the target in some fold.
    """
    folds = fold_of(readings.labels, NUM_FOLDS)
    exits = torch.empty(len(readings), dtype=torch.int64)
    spent = 0.0
    for fold in range(NUM_FOLDS):
        here = folds == fold
        seen, unseen = readings.subset(~here), readings.subset(here)
        if name == Learned.name:
            unseen = judged_by(fit_learned_exit(seen), unseen)
            seen = cross_fitted(seen)
        rows = sweep(seen, policy_grid(name, seen, num_thresholds), metric)
        policy = choose(rows, seen.score(metric), target).policy
        left = replay(policy, unseen)
        exits[here] = left
        spent += spent_flops(exit_flops(readings.model, policy), unseen, left)
    predictions = readings.answers_at(exits)
    return CrossFitted(
        score=readings.score(metric, predictions),
        mean_layer=float(torch.tensor(readings.exit_layers)[exits].double().mean()),
        flops_share=spent / float(full_flops(readings.model).at(readings.lengths).sum()),
        num_folds=NUM_FOLDS,
    )
