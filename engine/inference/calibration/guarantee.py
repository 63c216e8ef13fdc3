"""A setting of early exit with a bound on its loss on new texts, by learn-then-test.

Angelopoulos et al. 2021, "Learn then Test" (arXiv 2110.01052). For each setting of a policy the
hypothesis "its loss on new texts exceeds the limit" is tested. The settings and their order, safest
first, are fixed before the texts are seen, and testing stops at the first hypothesis that is not
rejected (fixed-sequence testing). So with the asked-for confidence no setting that passed exceeds
the limit, whichever of them is chosen afterwards.

The loss on a text is 0 or 1, so the number of losses is binomial and the p-value exact: it is the
probability of at most as many losses at the limit. No bound for general losses, such as
Hoeffding-Bentkus, is smaller.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ...model.answers import same_answers
from ...model.exit_policies import (
    FixedLayer,
    Patience,
    PatienceConfidence,
    Policy,
    Voting,
    make_policy,
    policy_class,
)
from .readings import ExitReadings
from .search import SweepRow, patiences, replay, sweep

# Risk -> the share that is bounded, for tables and messages.
RISKS = {
    "lost_answers": "of the texts that the full model answers right, the share that early exit "
    "answers wrong",
    "changed_answers": "the share of texts that early exit answers otherwise than the full model",
}
# Log odds of the thresholds that are tried: from where hardly any text leaves to where most do.
_LOG_ODDS = {"max_probability": (9.2, -9.2), "entropy": (-7.0, 7.0), "learned": (9.2, -4.0)}
_MOST_TEXTS = 10**9
# Thresholds to test for each of the ordinary search's: a longer fixed sequence needs no smaller
# p-values, and comes closer to the losses that are allowed.
_FINER = 10


@dataclass(frozen=True)
class Promise:
    """With `confidence`, the risk on new texts is at most `limit`; `risk`: one of `RISKS`.

    With lost_answers the accuracy falls by at most `limit` of the full model's: early exit keeps
    1 - limit of its right answers, and what it corrects comes on top.

    Raises:
        ValueError: a limit or a confidence outside (0, 1), or an unknown risk.
    """

    limit: float
    confidence: float
    risk: str = "lost_answers"

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise ValueError(
                f"confidence={self.confidence!r} is out of range: it must be more than 0 and less "
                "than 1, such as 0.95."
            )
        if not 0 < self.limit < 1:
            raise ValueError(
                f"max_quality_loss={self.limit!r}: no number of texts can show a loss of 0, and 1 "
                "promises nothing; with confidence it must be more than 0 and less than 1."
            )
        if self.risk not in RISKS:
            raise ValueError(f"risk={self.risk!r} is none of {', '.join(RISKS)}.")

    def __str__(self) -> str:
        return f"max_quality_loss={self.limit:g} with confidence={self.confidence:g}"

    def check_number(self, num_texts: int) -> None:
        """Refuse a split that is too small for any setting.

        Raises:
            ValueError: naming the number of texts that are needed.
        """
        least = least_texts(self.limit, 1 - self.confidence)
        if num_texts < least:
            raise ValueError(
                f"{self} needs at least {least} texts, even if none is lost: {num_texts} are "
                "given. Give more texts, or allow a larger max_quality_loss."
            )


@dataclass(frozen=True)
class Tested:
    """The test of a setting: `num_lost` of `num_texts` were lost, with this p-value."""

    policy: Policy
    num_lost: int
    num_texts: int
    p_value: float


def p_values(num_lost: ArrayLike, num_texts: ArrayLike, limit: float) -> NDArray[np.float64]:
    """Probability of at most `num_lost` losses among `num_texts` if the risk is `limit`.

    It is an exact p-value of "the risk exceeds the limit"; arguments of equal or one shape.
    """
    from scipy.special import bdtr

    values: NDArray[np.float64] = np.asarray(bdtr(num_lost, num_texts, limit), dtype=np.float64)
    return values


def num_passed(
    num_lost: NDArray[np.int64], num_texts: ArrayLike, limit: float, level: float
) -> NDArray[np.int64]:
    """Number of settings, from the safest on, that pass at the error probability `level`.

    `num_lost` [..., S]: losses of each setting in the order of the test, of `num_texts` (a number
    or [..., 1]); returns [...].
    """
    passed = p_values(num_lost, num_texts, limit) <= level
    return np.logical_and.accumulate(passed, axis=-1).sum(axis=-1)


def least_texts(limit: float, level: float) -> int:
    """Smallest number of texts on which a setting passes that loses none of them."""
    return max(1, math.ceil(math.log(level) / math.log1p(-limit)))


def enough_texts(rate: float, limit: float, level: float) -> int | None:
    """About the smallest number of texts on which a setting passes that loses `rate` of them.

    None where none is enough (the rate is at the limit or above), or more than a billion.
    """
    if rate >= limit:
        return None
    number = least_texts(limit, level)

    def passes(number: int) -> bool:
        return bool(p_values(math.ceil(rate * number), number, limit) <= level)

    if passes(number):
        return number
    low = number
    while not passes(number):
        low, number = number, 2 * number
        if number > _MOST_TEXTS:
            return None
    while number - low > 1:
        middle = (low + number) // 2
        low, number = (low, middle) if passes(middle) else (middle, number)
    return number


def sequences_of(
    name: str, exit_layers: Sequence[int], num_labels: int, num_thresholds: int
) -> list[list[Policy]]:
    """Settings of a policy in the order in which they are tested, safest first.

    They depend on nothing that was seen. Thresholds are evenly spaced in log odds. One sequence,
    but for patience_confidence, which has one for each patience.

    Raises:
        ValueError: the policy is unknown.
    """
    found = policy_class(name)
    num_exits = len(exit_layers)
    if found is FixedLayer:
        return [[FixedLayer(layer) for layer in reversed(exit_layers)]]
    if found is Patience:
        return [[Patience(patience) for patience in range(num_exits - 1, 0, -1)]]
    if found is Voting:
        return [[Voting(votes) for votes in range(num_exits, 0, -1)]]
    if found is PatienceConfidence:
        thresholds = _thresholds("max_probability", num_labels, num_thresholds)
        return [
            [PatienceConfidence(patience, threshold) for threshold in thresholds]
            for patience in patiences(num_exits)
        ]
    thresholds = _thresholds(name, num_labels, num_thresholds)
    return [[make_policy(name, threshold=threshold) for threshold in thresholds]]


def _thresholds(name: str, num_labels: int, number: int) -> list[float]:
    """Thresholds from that with which no text leaves early to that with which all do at once."""
    start, end = _LOG_ODDS[name]
    if name == "max_probability":
        # The largest of K probabilities is 1 / K at least.
        end = -math.log(max(num_labels - 1, 1))
    odds = np.linspace(start, end, number - 2)
    none, every = (0.0, 1.0) if name == "entropy" else (1.0, 0.0)
    return [none, *(1 / (1 + np.exp(-odds))).tolist(), every]


def counted(readings: ExitReadings, risk: str) -> Tensor:
    """The texts of which the risk is a share: bool [n]."""
    right = same_answers(readings.answers[-1], readings.labels, readings.several)
    return right if risk == "lost_answers" else torch.ones_like(right)


def certify(
    sequence: Sequence[Policy], readings: ExitReadings, promise: Promise, level: float
) -> tuple[list[Tested], Tested | None]:
    """Test settings in their order; returns those that passed, and the first that failed."""
    counts = counted(readings, promise.risk)
    answers = readings.answers
    lost = ~same_answers(answers, answers[-1], readings.several)[:, counts]  # [E, counted]
    places = torch.arange(lost.shape[1])
    num_lost = np.array(
        [int(lost[replay(policy, readings)[counts], places].sum()) for policy in sequence]
    )
    num_texts = len(places)
    tested = [
        Tested(policy, int(number), num_texts, float(p_value))
        for policy, number, p_value in zip(
            sequence, num_lost, p_values(num_lost, num_texts, promise.limit), strict=True
        )
    ]
    passed = int(num_passed(num_lost, num_texts, promise.limit, level))
    return tested[:passed], tested[passed] if passed < len(tested) else None


def choose_certified(
    name: str,
    readings: ExitReadings,
    metric: str,
    promise: Promise,
    *,
    num_thresholds: int = 33,
) -> tuple[SweepRow, dict[str, Any]]:
    """The cheapest setting of a policy that keeps a promise, and the record of the guarantee.

    The texts must be new to the model: neither trained on, nor used to choose it. For each of
    `num_thresholds` ten are tested.

    Raises:
        ValueError: too few texts, or no setting with which a text leaves early passes; the message
            says how many texts would do.
    """
    # The answer to a label is a choice of two.
    num_labels = 2 if readings.several else readings.logits.shape[-1]
    sequences = sequences_of(name, readings.exit_layers, num_labels, _FINER * num_thresholds)
    # Several sequences share the error probability (Bonferroni).
    level = (1 - promise.confidence) / len(sequences)
    least = least_texts(promise.limit, level)
    num_texts = int(counted(readings, promise.risk).sum())
    if num_texts < least:
        raise ValueError(f"{promise} needs {_more_texts(num_texts, least, len(readings), promise)}")
    passed: list[Tested] = []
    failed: list[Tested] = []
    for sequence in sequences:
        good, first_bad = certify(sequence, readings, promise, level)
        passed += good
        failed += [] if first_bad is None else [first_bad]
    rows = sweep(readings, [test.policy for test in passed], metric)
    early = [row for row in rows if row.flops_share < 1]
    if not early:
        raise ValueError(
            f"{promise}: no setting that saves operations passes.{_nearest(failed, promise, level)}"
        )
    chosen = min(early, key=lambda row: (row.flops_share, -row.score))
    test = passed[rows.index(chosen)]
    enough = enough_texts(test.num_lost / num_texts, promise.limit, level)
    return chosen, {
        **asdict(promise),
        "num_texts": num_texts,
        "num_lost": test.num_lost,
        "p_value": test.p_value,
        "num_tested": len(passed) + len(failed),
        "least_texts": least,
        # The tested texts were enough, even where rounding the losses up gives a larger number.
        "enough_texts": num_texts if enough is None else min(enough, num_texts),
    }


def short(record: Mapping[str, Any]) -> str:
    """Limit and confidence of a record, such as `1% at 95%`."""
    return f"{100 * record['limit']:g}% at {100 * record['confidence']:g}%"


def words(record: Mapping[str, Any]) -> str:
    """A sentence on the guarantee of a record that `choose_certified` returned."""
    enough = record["enough_texts"]  # None in a file of an earlier version
    return (
        f"With confidence {record['confidence']:g}, {RISKS[record['risk']]} is at most "
        f"{record['limit']:g} on new texts of the same source. Lost in the test: "
        f"{record['num_lost']} of {record['num_texts']} texts. To pass it takes "
        + ("" if enough is None else f"about {enough} texts at this rate of loss, and ")
        + f"{record['least_texts']} if none is lost."
    )


def _more_texts(num_texts: int, least: int, num_given: int, promise: Promise) -> str:
    if promise.risk == "changed_answers":
        return f"at least {least} texts, even if no answer changes: {num_texts} are given."
    total = math.ceil(least * num_given / num_texts) if num_texts else None
    return (
        f"at least {least} texts that the full model answers right, even if none is lost; it "
        f"answers {num_texts} of the {num_given} given right."
        + ("" if total is None else f" About {total} texts like these would do.")
    )


def _nearest(failed: Sequence[Tested], promise: Promise, level: float) -> str:
    """Words on the setting that failed with the fewest losses; empty if none failed."""
    if not failed:
        return ""
    first = min(failed, key=lambda test: test.num_lost)
    enough = enough_texts(first.num_lost / first.num_texts, promise.limit, level)
    remedy = (
        "no number of texts would do at this rate: allow a larger loss, or take another policy"
        if enough is None
        else f"at this rate about {enough} such texts would do"
    )
    return (
        f" The first that failed, {first.policy}, lost {first.num_lost} of {first.num_texts} "
        f"texts: {remedy}."
    )
