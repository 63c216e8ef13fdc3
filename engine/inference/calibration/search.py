"""Choice of a policy and its threshold on labelled texts, from one pass through all exits.

A policy is replayed on the readings of the exits with the code that decides during inference, so
many thresholds cost one pass of the model, and the results are those of inference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...model.encoder_layers import Flops
from ...model.exit_policies import (
    POLICIES,
    FixedLayer,
    Learned,
    Memory,
    Patience,
    PatienceConfidence,
    Policy,
    ThresholdPolicy,
    Voting,
    make_policy,
    policy_class,
)
from ...model.flops import exit_flops, full_flops
from ...runtime.device import dtype_name
from .readings import ExitReadings

# Thresholds are not put between signals closer than this, where rounding would decide.
_SAFE_GAP = 4e-6
# Definition of `area_under_curve` for tables.
AREA_WORDS = (
    "mean, over all budgets from the first exit's operations to the full model's, of the best score"
    " within the budget"
)


def replay(policy: Policy, readings: ExitReadings) -> Tensor:
    """The position of the exit (0 = first) where each text leaves under a policy: int64 [n]."""
    _check_usable(policy, readings)
    last = len(readings.exit_layers) - 1
    exits = torch.full((len(readings),), last)
    memory: Memory = {}
    for index, layer in enumerate(readings.exit_layers[:-1]):
        if not policy.reads(layer):
            continue
        leaving, memory = policy.leaves(readings.at(index), memory)
        exits[leaving & (exits == last)] = index
    return exits


@dataclass(frozen=True)
class SweepRow:
    """Results of a setting of a policy on the calibration texts.

    score: the metric, as a fraction; mean_layer: layers run per text; flops_share: operations as a
    share of the full model's.
    """

    policy: Policy
    score: float
    mean_layer: float
    flops_share: float


def sweep(readings: ExitReadings, policies: Sequence[Policy], metric: str) -> list[SweepRow]:
    """Score and cost of each policy, in the order given.

    Raises:
        ValueError: a policy does not suit the model's exits, or the metric is unknown.
    """
    full_cost = float(full_flops(readings.model).at(readings.lengths).sum())
    costs: dict[tuple[type[Policy], int], list[Flops]] = {}
    layers = torch.tensor(readings.exit_layers)
    rows = []
    for policy in policies:
        exits = replay(policy, readings)
        # Costs depend on the exits that a policy reads, hence on its class and its layer.
        key = (type(policy), policy.layer if isinstance(policy, FixedLayer) else 0)
        if key not in costs:
            costs[key] = exit_flops(readings.model, policy)
        spent = spent_flops(costs[key], readings, exits)
        predictions = readings.answers_at(exits)
        rows.append(
            SweepRow(
                policy=policy,
                score=readings.score(metric, predictions),
                mean_layer=float(layers[exits].double().mean()),
                flops_share=spent / full_cost,
            )
        )
    return rows


def spent_flops(costs: Sequence[Flops], readings: ExitReadings, exits: Tensor) -> float:
    """Operations on all texts, text i leaving at `exits`[i]; `costs`: of each exit."""
    return sum(
        float(cost.at(readings.lengths[exits == index]).sum()) for index, cost in enumerate(costs)
    )


def policy_grid(name: str, readings: ExitReadings, num_thresholds: int = 33) -> list[Policy]:
    """Settings of a policy to try on these texts, from "all leave at the first exit" to "none".

    Thresholds are near quantiles of the observed signals, in the middle of a wide gap between two
    of them, so that float32 rounding decides on no text. Integers: all that the exits allow.

    Raises:
        ValueError: the policy is unknown, or does not suit the model.
    """
    if num_thresholds < 3:
        raise ValueError(f"num_thresholds={num_thresholds}: at least 3 are needed.")
    found = policy_class(name)
    num_exits = len(readings.exit_layers)
    if found is FixedLayer:
        return [FixedLayer(layer) for layer in readings.exit_layers]
    if found is Patience:
        return [Patience(patience) for patience in range(1, num_exits)]
    if found is Voting:
        return [Voting(votes) for votes in range(1, num_exits + 1)]
    if found is PatienceConfidence:
        thresholds = _thresholds(POLICIES["max_probability"], readings, num_thresholds)
        return [
            PatienceConfidence(patience, threshold)
            for patience in patiences(num_exits)
            for threshold in thresholds
        ]
    return [
        make_policy(name, threshold=threshold)
        for threshold in _thresholds(found, readings, num_thresholds)
    ]


def patiences(num_exits: int) -> range:
    """The values of patience_confidence with which a text can leave early.

    Patience 1 is the policy max_probability.
    """
    return range(2, num_exits)


def frontier(rows: Sequence[SweepRow]) -> list[SweepRow]:
    """The settings that score more than all cheaper ones, cheapest first."""
    best: list[SweepRow] = []
    for row in sorted(rows, key=lambda row: (row.flops_share, -row.score)):
        if not best or row.score > best[-1].score:
            best.append(row)
    return best


def spread_out(
    rows: Sequence[SweepRow], number: int, chosen: SweepRow | None = None
) -> list[SweepRow]:
    """At most `number` (3 or more) settings of the frontier, spread over their operations.

    Cheapest first, with both ends of the frontier, and with `chosen` even if it is not on it.
    """
    assert number >= 3, number
    kept = frontier(rows)
    if chosen is not None and chosen not in kept:
        kept = sorted([*kept, chosen], key=lambda row: row.flops_share)
    while len(kept) > number:
        # Drop the setting whose neighbours are closest to each other.
        inner = [place for place in range(1, len(kept) - 1) if kept[place] != chosen]
        del kept[min(inner, key=lambda at: kept[at + 1].flops_share - kept[at - 1].flops_share)]
    return kept


def area_under_curve(rows: Sequence[SweepRow], readings: ExitReadings, metric: str) -> float:
    """Mean over all budgets of the best score within the budget, in the unit of the metric.

    A budget is a share of the full model's operations, between that of leaving at the first exit
    and 1. Leaving at the first exit counts as a setting of every policy, so that all areas cover
    the same budgets. The curve is a step function.
    """
    first = sweep(readings, [FixedLayer(readings.exit_layers[0])], metric)[0]
    points = [(row.flops_share, row.score) for row in rows if row.flops_share < 1]
    points = sorted([*points, (first.flops_share, first.score)])
    area, best = 0.0, -math.inf
    shares = [*(share for share, _ in points[1:]), 1.0]
    for (share, reached), next_share in zip(points, shares, strict=True):
        best = max(best, reached)
        area += best * (next_share - share)
    return area / (1 - points[0][0])


@dataclass(frozen=True)
class Target:
    """The target that a policy is chosen for; exactly one of three.

    max_quality_loss: relative loss of the metric against the full model (0.01: one per cent);
    max_mean_layer: layers run per text; max_flops_share: share of the full model's operations.
    """

    max_quality_loss: float | None = None
    max_mean_layer: float | None = None
    max_flops_share: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ValueError(
                f"{' and '.join(given) or 'no target'}: give exactly one of "
                f"{', '.join(vars(self))}."
            )
        for name, value in given.items():
            most = math.inf if name == "max_mean_layer" else 1
            if not 0 <= value <= most:
                raise ValueError(
                    f"{name}={value!r} is out of range: it must be "
                    + ("0 or more." if most == math.inf else "from 0 to 1.")
                )


def choose(rows: Sequence[SweepRow], full_score: float, target: Target) -> SweepRow:
    """The cheapest setting of sufficient quality, or the best within the budget.

    Its score on the texts that it was chosen on is slightly better than on others.

    Raises:
        ValueError: no setting reaches the target; the message names the nearest.
    """
    if not rows:
        raise ValueError("rows is empty: there is no setting to choose from.")
    if target.max_quality_loss is not None:
        least = full_score - target.max_quality_loss * abs(full_score)
        good = [row for row in rows if row.score >= least]
        if not good:
            nearest = max(rows, key=lambda row: row.score)
            raise ValueError(
                f"max_quality_loss={target.max_quality_loss:g}: no setting scores {least:.4f} or "
                f"more; {nearest.policy} comes nearest with {nearest.score:.4f}. Allow a larger "
                "max_quality_loss."
            )
        return min(good, key=lambda row: (row.flops_share, -row.score))
    name = "mean_layer" if target.max_mean_layer is not None else "flops_share"
    limit = getattr(target, f"max_{name}")
    affordable = [row for row in rows if getattr(row, name) <= limit]
    if not affordable:
        nearest = min(rows, key=lambda row: getattr(row, name))
        raise ValueError(
            f"max_{name}={limit:g}: no setting is as fast; {nearest.policy} comes nearest with "
            f"{getattr(nearest, name):.4g}. Allow a larger max_{name}."
        )
    return max(affordable, key=lambda row: (row.score, -row.flops_share))


def calibration_record(
    row: SweepRow,
    readings: ExitReadings,
    *,
    data: str,
    metric: str,
    target: Target,
    dtype: torch.dtype,
    max_seq_length: int,
) -> dict[str, Any]:
    """The record of a chosen policy that a model's configuration stores.

    `data`: name of the texts ("mrpc, validation"); `dtype` and `max_seq_length`: those of the
    readings. They are recorded because a threshold is valid only for signals computed with them.
    """
    return {
        "name": row.policy.name,
        "parameters": row.policy.parameters,
        "calibration": {
            "data": data,
            "num_samples": len(readings),
            "dtype": dtype_name(dtype),
            "max_seq_length": max_seq_length,
            "metric": metric,
            "full_score": readings.score(metric),
            "score": row.score,
            "mean_layer": row.mean_layer,
            "flops_share": row.flops_share,
            "target": {name: value for name, value in vars(target).items() if value is not None},
        },
    }


def _check_usable(policy: Policy, readings: ExitReadings) -> None:
    policy.check(readings.exit_layers, readings.several)
    if policy.needs_learned_exit and readings.certainties is None:
        raise ValueError(
            f"The policy {policy.name} needs the model's learned exit: fit one first "
            "(learned_exit.with_learned_exit)."
        )


def _thresholds(policy: type[Policy], readings: ExitReadings, num_thresholds: int) -> list[float]:
    """Thresholds 0 and 1, and near quantiles of the policy's signal at all exits but the last."""
    assert issubclass(policy, ThresholdPolicy)
    if policy is Learned:
        _check_usable(Learned(0.0), readings)
    earlier = range(len(readings.exit_layers) - 1)
    seen = np.unique(torch.cat([policy.signal(readings.at(index)) for index in earlier]).numpy())
    seen = seen.astype(np.float64)
    gaps, middles = np.diff(seen), (seen[1:] + seen[:-1]) / 2
    found = {0.0, 1.0}
    for part in np.array_split(np.arange(len(gaps)), num_thresholds - 2):
        if len(part) and gaps[part].max() > _SAFE_GAP:
            found.add(float(middles[part[np.argmax(gaps[part])]]))
    return sorted(found)
