"""Choosing a policy and its threshold on labelled texts, from one pass through all exits.

A policy is replayed on what the exits showed: the very code that inference runs decides, so a sweep
over many thresholds costs one pass of the model and says what inference will do.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .batching import EncodedSplit, collate, epoch_batches
from .early_exiting import certainty_of, check_has_earlier_exits, exit_flops, full_flops
from .evaluation import score
from .exit_policies import (
    POLICIES,
    ExitReading,
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
from .layers import Flops
from .precision import autocast

if TYPE_CHECKING:
    from .modeling import MultiExitForSequenceClassification

logger = logging.getLogger("fusedacl")
# No threshold lies between signals that are nearer than this: rounding would decide.
_SAFE_GAP = 4e-6


@dataclass(frozen=True)
class ExitReadings:
    """What n labelled texts showed at each of E exits, and what each exit costs; on the CPU.

    logits [E, n, K] float32; labels [n]; lengths [n] in tokens; exit_layers: E layers, ascending.
    certainties [E, n]: the learned exit's, None without one.
    """

    logits: Tensor
    labels: Tensor
    lengths: Tensor
    exit_layers: list[int]
    certainties: Tensor | None
    model: MultiExitForSequenceClassification

    def at(self, index: int) -> ExitReading:
        """What the texts showed at one exit, by its place in `exit_layers`."""
        certainty = None if self.certainties is None else self.certainties[index]
        return ExitReading(self.exit_layers[index], self.logits[index], certainty)

    def score(self, metric: str, predictions: Tensor | None = None) -> float:
        """The metric of predicted classes [n]; of the full model without them."""
        if predictions is None:
            predictions = self.logits[-1].argmax(dim=-1)
        return score([metric], predictions.numpy(), self.labels.numpy())[metric]


@torch.inference_mode()
def read_exits(
    model: MultiExitForSequenceClassification,
    encoded: EncodedSplit,
    batch_size: int,
    *,
    pad_token_id: int,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> ExitReadings:
    """One pass of a labelled split through all exits.

    Raises:
        ValueError: the split has no labels, or the model has one exit.
    """
    check_has_earlier_exits(model)
    logits, certainties, _ = _pass(
        model, encoded, batch_size, pad_token_id, dtype, progress, keep_embeddings=False
    )
    return ExitReadings(
        logits=logits,
        labels=_labels(encoded),
        lengths=torch.from_numpy(encoded.lengths),
        exit_layers=list(model.exit_layers),
        certainties=certainties,
        model=model,
    )


def replay(policy: Policy, readings: ExitReadings) -> Tensor:
    """The exit (its place, 0 = first) where each text leaves under a policy: int64 [n]."""
    _check_usable(policy, readings)
    last = len(readings.exit_layers) - 1
    exits = torch.full_like(readings.labels, last)
    memory: Memory = {}
    for index, layer in enumerate(readings.exit_layers[:-1]):
        if not policy.reads(layer):
            continue
        leaving, memory = policy.leaves(readings.at(index), memory)
        exits[leaving & (exits == last)] = index
    return exits


@dataclass(frozen=True)
class SweepRow:
    """One setting of a policy on the calibration texts.

    score: of the metric swept for, a fraction; mean_layer: layers run per text;
    flops_share: of the full model's operations; exit_counts: layer -> texts that left there.
    """

    policy: Policy
    score: float
    mean_layer: float
    flops_share: float
    exit_counts: dict[int, int]


def sweep(readings: ExitReadings, policies: Sequence[Policy], metric: str) -> list[SweepRow]:
    """What each policy would score and cost, in the order given.

    Raises:
        ValueError: a policy that the model's exits cannot carry, an unknown metric.
    """
    full_cost = float(full_flops(readings.model).at(readings.lengths).sum())
    costs: dict[tuple[type[Policy], int], list[Flops]] = {}
    layers = torch.tensor(readings.exit_layers)
    rows = []
    texts = torch.arange(len(readings.labels))
    for policy in policies:
        exits = replay(policy, readings)
        # Policies that read the same exits cost the same at each of them.
        key = (type(policy), policy.layer if isinstance(policy, FixedLayer) else 0)
        if key not in costs:
            costs[key] = exit_flops(readings.model, policy)
        spent = sum(
            float(cost.at(readings.lengths[exits == index]).sum())
            for index, cost in enumerate(costs[key])
        )
        predictions = readings.logits[exits, texts].argmax(dim=-1)
        counts = torch.bincount(exits, minlength=len(layers)).tolist()
        rows.append(
            SweepRow(
                policy=policy,
                score=readings.score(metric, predictions),
                mean_layer=float(layers[exits].double().mean()),
                flops_share=spent / full_cost,
                exit_counts=dict(zip(readings.exit_layers, counts, strict=True)),
            )
        )
    return rows


def policy_grid(name: str, readings: ExitReadings, num_thresholds: int = 33) -> list[Policy]:
    """Settings of a policy worth trying on these texts, from "all leave at once" to "nobody does".

    Thresholds lie at quantiles of the signals seen, each in the middle of a wide gap between two of
    them, so that rounding decides on no text (in float32). Integers: all that the exits allow.

    Raises:
        ValueError: an unknown policy, or one that the model cannot carry.
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
        # Patience 1 is the policy max_probability.
        thresholds = _thresholds(POLICIES["max_probability"], readings, num_thresholds)
        return [
            PatienceConfidence(patience, threshold)
            for patience in range(2, num_exits + 1)
            for threshold in thresholds
        ]
    return [
        make_policy(name, threshold=threshold)
        for threshold in _thresholds(found, readings, num_thresholds)
    ]


def frontier(rows: Sequence[SweepRow]) -> list[SweepRow]:
    """The settings that none beats, cheapest first: each scores more than all cheaper ones."""
    best: list[SweepRow] = []
    for row in sorted(rows, key=lambda row: (row.flops_share, -row.score)):
        if not best or row.score > best[-1].score:
            best.append(row)
    return best


def area_under_curve(rows: Sequence[SweepRow], readings: ExitReadings, metric: str) -> float:
    """Mean over all budgets of the best score that a budget allows: one number for a policy.

    A budget is a share of the full model's operations, from what it takes if all texts leave at the
    first exit (which is counted among every policy's settings, so that policies compare) to 1. The
    curve is a staircase; its mean has the metric's own unit.
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
    """What a policy is chosen for; exactly one of the three.

    max_quality_loss: relative loss of the metric against the full model (0.01: one per cent);
    max_mean_layer: layers run per text; max_flops_share: of the full model's operations.
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
    """The cheapest setting of enough quality, or the best within the budget.

    Chosen on the texts that are scored, the result is a little better there than elsewhere.

    Raises:
        ValueError: no setting reaches the target; the nearest is told.
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
                f"more; {nearest.policy} comes nearest with {nearest.score:.4f}."
            )
        return min(good, key=lambda row: (row.flops_share, -row.score))
    name = "mean_layer" if target.max_mean_layer is not None else "flops_share"
    limit = getattr(target, f"max_{name}")
    affordable = [row for row in rows if getattr(row, name) <= limit]
    if not affordable:
        nearest = min(rows, key=lambda row: getattr(row, name))
        raise ValueError(
            f"max_{name}={limit:g}: no setting is as fast; {nearest.policy} comes nearest with "
            f"{getattr(nearest, name):.4g}."
        )
    return max(affordable, key=lambda row: (row.score, -row.flops_share))


def calibration_record(
    row: SweepRow, readings: ExitReadings, *, data: str, metric: str, target: Target
) -> dict[str, Any]:
    """What a model's configuration keeps: a chosen policy, its parameters and how it was chosen.

    `data`: the name of the texts, such as "mrpc, validation".
    """
    return {
        "name": row.policy.name,
        "parameters": row.policy.parameters,
        "calibration": {
            "data": data,
            "num_samples": len(readings.labels),
            "metric": metric,
            "full_score": readings.score(metric),
            "score": row.score,
            "mean_layer": row.mean_layer,
            "flops_share": row.flops_share,
            "target": {name: value for name, value in vars(target).items() if value is not None},
        },
    }


def store_policy(model: MultiExitForSequenceClassification, record: Mapping[str, Any]) -> None:
    """Make a calibrated policy the model's own: `save_pretrained` then writes it with the model."""
    model.config.exit_policy = dict(record)


def fit_learned_exit(
    model: MultiExitForSequenceClassification,
    encoded: EncodedSplit,
    batch_size: int,
    *,
    pad_token_id: int,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
    regularization: float = 1.0,
) -> nn.Linear:
    """Train the learned exit of a model whose exits are trained, and put it into the model.

    One linear layer for all exits, from an exit's representation h to the log odds that the exit's
    answer is right, by logistic regression on standardised h with an L2 penalty (BERxiT fits a
    square loss during training; ours comes after it). The last exit, which nobody asks, is left
    out. The texts should not be those that the exits were trained on, where they are nearly always
    right.

    Raises:
        ValueError: no labels, one exit, or exits that are right (or wrong) on every text.
    """
    from sklearn.linear_model import LogisticRegression

    check_has_earlier_exits(model)
    labels = _labels(encoded)
    num_earlier, width = len(model.exit_layers) - 1, model.label_embeddings.shape[-1]
    size = num_earlier * len(encoded) * width * 4
    logger.info(
        f"learned exit: {num_earlier} exits x {len(encoded)} texts x {width} numbers, "
        f"{size / 2**20:.0f} MiB of memory"
    )
    logits, _, embeddings = _pass(
        model, encoded, batch_size, pad_token_id, dtype, progress, keep_embeddings=True
    )
    assert embeddings is not None
    is_right = (logits[:-1].argmax(dim=-1) == labels).flatten().numpy()
    if is_right.all() or not is_right.any():
        raise ValueError(
            f"The exits are {'right' if is_right.all() else 'wrong'} on all {len(encoded)} texts: "
            "there is nothing to learn. Use texts that the exits were not trained on."
        )
    inputs = embeddings.flatten(0, 1).numpy()
    mean, deviation = inputs.mean(axis=0), inputs.std(axis=0)
    deviation[deviation == 0] = 1
    inputs -= mean
    inputs /= deviation
    fitted = LogisticRegression(C=1 / regularization, max_iter=1000).fit(inputs, is_right)
    # The standardisation becomes part of the layer.
    weight = fitted.coef_[0] / deviation
    head = nn.Linear(width, 1)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        head.bias.copy_(torch.from_numpy(fitted.intercept_ - weight @ mean))
    model.learned_exit = head.to(model.device)
    model.config.learned_exit = True
    return head


@torch.inference_mode()
def _pass(
    model: MultiExitForSequenceClassification,
    encoded: EncodedSplit,
    batch_size: int,
    pad_token_id: int,
    dtype: torch.dtype,
    progress: bool,
    *,
    keep_embeddings: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Logits [E, n, K], certainties [E, n] and the earlier exits' embeddings [E - 1, n, d]."""
    device = model.device
    num_exits, num_rows = len(model.exit_layers), len(encoded)
    learned_exit: nn.Linear | None = getattr(model, "learned_exit", None)
    logits = torch.empty(num_exits, num_rows, model.num_labels)
    certainties = None if learned_exit is None else torch.empty(num_exits, num_rows)
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
                certainties[:, rows] = certainty_of(learned_exit, output.exit_embeddings).cpu()
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


def _check_usable(policy: Policy, readings: ExitReadings) -> None:
    policy.check(readings.exit_layers)
    if policy.needs_learned_exit and readings.certainties is None:
        raise ValueError(
            f"The policy {policy.name} needs the model's learned exit: call fit_learned_exit first."
        )


def _thresholds(policy: type[Policy], readings: ExitReadings, num_thresholds: int) -> list[float]:
    """0, 1 and quantiles of a policy's signal at all exits but the last."""
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
