"""Learn-then-test: exact p-values, the order of the tests, and how often promises are broken."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from fusedacl.engine.inference.calibration.guarantee import (
    Promise,
    certify,
    choose_certified,
    counted,
    enough_texts,
    least_texts,
    num_passed,
    p_values,
    sequences_of,
    words,
)
from fusedacl.engine.inference.calibration.readings import ExitReadings
from fusedacl.engine.inference.calibration.search import replay
from fusedacl.engine.model.exit_policies import POLICIES
from fusedacl.engine.model.multi_exit import MultiExitForSequenceClassification
from sklearn.linear_model import LogisticRegression
from torch import Tensor

NUM_DRAWS = 1000


def synthetic(num_texts: int, seed: int) -> ExitReadings:
    """Texts of 3 classes that differ in how hard they are; later exits are right more often."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (num_texts,), generator=draw)
    signal = torch.nn.functional.one_hot(labels, 3) * (
        0.2 + torch.rand(num_texts, 1, generator=draw)
    )
    noise = torch.randn(4, num_texts, 3, generator=draw)
    # The exits share most of their errors, as those of a model do.
    noise = noise.cumsum(dim=0) / torch.arange(1, 5)[:, None, None]
    logits = (4 * signal + noise) * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None]
    lengths = torch.full((num_texts,), 10)
    return ExitReadings(logits, labels, lengths, [1, 2, 3, 4], None, cast(Any, None))


def lost_by(readings: ExitReadings, policies: list[Any]) -> Tensor:
    """True where a setting loses a text that the full model answers right: bool [S, n']."""
    rows = torch.arange(len(readings))
    right = counted(readings, "lost_answers")
    answers = readings.logits.argmax(dim=-1)
    lost = [answers[replay(policy, readings), rows] != answers[-1] for policy in policies]
    return torch.stack(lost)[:, right]


def test_p_values_are_exact() -> None:
    for lost, texts, limit in ((0, 50, 0.01), (3, 50, 0.1), (7, 20, 0.3)):
        exact = sum(
            math.comb(texts, k) * limit**k * (1 - limit) ** (texts - k) for k in range(lost + 1)
        )
        assert p_values(lost, texts, limit) == pytest.approx(exact, rel=1e-12)
    assert least_texts(0.01, 0.05) == 299
    assert p_values(0, 299, 0.01) <= 0.05 < p_values(0, 298, 0.01)


def test_how_many_texts_would_do() -> None:
    number = enough_texts(0.005, 0.01, 0.05)
    assert number is not None and 900 < number < 2000
    assert p_values(math.ceil(0.005 * number), number, 0.01) <= 0.05
    assert p_values(math.ceil(0.005 * (number - 1)), number - 1, 0.01) > 0.05
    assert enough_texts(0.0, 0.01, 0.05) == 299
    assert enough_texts(0.01, 0.01, 0.05) is None
    assert enough_texts(0.01 - 1e-9, 0.01, 0.05) is None


def test_settings_fall_at_the_first_that_fails() -> None:
    lost = np.array([[0, 0, 9, 0], [0, 0, 0, 0], [9, 0, 0, 0]])
    assert num_passed(lost, 400, 0.01, 0.05).tolist() == [2, 4, 0]


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"learned"}))
def test_the_safest_setting_is_tested_first(name: str) -> None:
    readings = synthetic(400, seed=1)
    for sequence in sequences_of(name, [1, 2, 3, 4], 3, 9):
        means = [replay(policy, readings).double().mean() for policy in sequence]
        assert means[0] == 3
        assert means == sorted(means, reverse=True)
        assert means[-1] <= means[0] - 1 or getattr(sequence[0], "patience", 0) == 4
    # Where a sequence ends does not depend on texts.
    assert sequences_of(name, [1, 2, 3, 4], 3, 9) == sequences_of(name, [1, 2, 3, 4], 3, 9)


@pytest.mark.parametrize(("confidence", "num_texts"), [(0.95, 1200), (0.8, 300)])
@pytest.mark.parametrize("name", ["max_probability", "entropy", "patience", "fixed_layer"])
def test_promises_are_broken_as_rarely_as_promised(
    name: str, confidence: float, num_texts: int
) -> None:
    """1,000 sets drawn from 20,000 texts, whose shares of lost answers are the true risks.

    The limit lies just below the risk of a setting, where breaking the promise is most likely.
    """
    population = synthetic(20_000, seed=2)
    (sequence,) = sequences_of(name, population.exit_layers, 3, 17)
    lost = lost_by(population, sequence).numpy()
    risks = lost.mean(axis=1)
    limit = 0.999 * risks[np.searchsorted(risks >= 0.02, True)]
    assert limit > 0.015
    level = 1 - confidence
    random = np.random.default_rng(3)
    drawn = random.integers(lost.shape[1], size=(NUM_DRAWS, num_texts))
    num_lost = np.stack([setting[drawn].sum(axis=1) for setting in lost], axis=1)
    passed = num_passed(num_lost, num_texts, limit, level)
    broken = np.mean([(risks[:number] > limit).any() for number in passed])
    assert broken <= level + 3 * math.sqrt(level * confidence / NUM_DRAWS)
    # The bound is exact but for whole numbers: a looser one would break fewer.
    assert broken >= level / 4
    # Without a bound, the rate seen on the texts breaks the promise far more often.
    first_bad = int(np.argmax(risks > limit))
    assert np.mean(num_lost[:, first_bad] <= limit * num_texts) > 1.5 * broken


def test_the_number_of_passed_settings_is_that_of_the_simulation() -> None:
    readings = synthetic(900, seed=4)
    (sequence,) = sequences_of("entropy", readings.exit_layers, 3, 17)
    passed, failed = certify(sequence, readings, Promise(0.03, 0.9), 0.1)
    lost = lost_by(readings, list(sequence)).numpy()
    number = int(num_passed(lost.sum(axis=1), lost.shape[1], 0.03, 0.1))
    assert 0 < number == len(passed) < len(sequence)
    assert failed is not None and failed.policy == sequence[number]
    assert (failed.num_lost, failed.num_texts) == (lost[number].sum(), lost.shape[1])


@pytest.mark.parametrize("name", ["entropy", "patience_confidence", "voting"])
@pytest.mark.parametrize("risk", ["lost_answers", "changed_answers"])
def test_the_cheapest_setting_that_passed(
    name: str, risk: str, exit_readings: ExitReadings
) -> None:
    promise = Promise(0.9, 0.5, risk)
    chosen, record = choose_certified(name, exit_readings, "accuracy", promise)
    assert chosen.flops_share < 1
    assert record["num_texts"] == (64 if risk == "lost_answers" else 80)
    sequences = sequences_of(name, exit_readings.exit_layers, 3, 330)
    level = 0.5 / len(sequences)
    assert record["p_value"] <= level
    assert record["p_value"] == p_values(record["num_lost"], record["num_texts"], 0.9)
    for sequence in sequences:
        passed, _ = certify(sequence, exit_readings, promise, level)
        for test in passed:
            assert replay(test.policy, exit_readings).sum() >= 0
    assert f"{record['num_lost']} of {record['num_texts']} texts" in words(record)
    assert record["least_texts"] <= record["enough_texts"] <= record["num_texts"]


def test_thresholds_are_fine_enough_to_use_the_losses_that_are_allowed(
    exit_model: MultiExitForSequenceClassification,
) -> None:
    """Hardly a text could be lost on top of those of the chosen setting."""
    readings = dataclasses.replace(synthetic(3000, seed=6), model=exit_model)
    for name in ("max_probability", "entropy"):
        _, record = choose_certified(name, readings, "accuracy", Promise(0.05, 0.95))
        number = record["num_texts"]
        allowed = int(np.sum(p_values(np.arange(number), number, 0.05) <= 0.05)) - 1
        assert allowed - 5 <= record["num_lost"] <= allowed


def test_a_patience_with_which_no_text_leaves_takes_no_share_of_the_error() -> None:
    def found(layers: list[int]) -> list[int]:
        sequences = sequences_of("patience_confidence", layers, 3, 33)
        return [sequence[0].parameters["patience"] for sequence in sequences]

    assert [found([1, 2]), found([1, 2, 3]), found([1, 2, 3, 4])] == [[], [2], [2, 3]]


def test_what_is_too_small_or_too_bad(exit_readings: ExitReadings) -> None:
    def refused(limit: float, confidence: float, risk: str = "lost_answers") -> str:
        with pytest.raises(ValueError) as raised:
            choose_certified("entropy", exit_readings, "accuracy", Promise(limit, confidence, risk))
        return str(raised.value)

    message = refused(0.01, 0.95)
    assert "needs at least 299 texts that the full model answers right" in message
    assert "answers 64 of the 80 given right. About 374 texts like these would do" in message
    assert "needs at least 299 texts, even if no answer changes: 80 are" in refused(
        0.01, 0.95, "changed_answers"
    )
    # Enough texts for a setting without losses, but the first that leaves early loses too many.
    assert "no setting that saves operations passes. The first that failed" in refused(0.05, 0.95)


@pytest.mark.parametrize("confidence", [0.0, 1.0, -0.5, 95.0, math.nan])
def test_confidence_lies_between_0_and_1(confidence: float) -> None:
    with pytest.raises(ValueError, match="confidence=.* is out of range"):
        Promise(0.01, confidence)


@pytest.mark.parametrize("limit", [0.0, -0.1, 1.0])
def test_limits_that_cannot_be_shown(limit: float) -> None:
    with pytest.raises(ValueError, match=r"max_quality_loss=.*must be more than 0"):
        Promise(limit, 0.95)


@pytest.mark.real_data
def test_held_back_halves_of_questions(real_data: Path, minilm: Path) -> None:
    """Exits on a frozen MiniLM, on TREC-6: half of the texts choose, the other half judges."""
    readings = trec_readings(real_data, minilm)
    promise = Promise(0.1, 0.9)
    (sequence,) = sequences_of("entropy", readings.exit_layers, 6, 17)
    lost = lost_by(readings, list(sequence)).numpy()
    random = np.random.default_rng(5)
    broken = saved = 0
    for _ in range(200):
        order = random.permutation(lost.shape[1])
        here, there = np.array_split(order, 2)
        number = int(num_passed(lost[:, here].sum(axis=1), len(here), promise.limit, 0.1))
        broken += bool(lost[number - 1, there].mean() > promise.limit)
        saved += number > 1
    assert broken <= 0.1 * 200 + 3 * math.sqrt(0.1 * 0.9 * 200)
    assert saved > 150


def trec_readings(real_data: Path, minilm: Path) -> ExitReadings:
    """Readings of 800 questions; the exits were fitted on 800 others, the encoder is frozen."""
    import dataclasses

    import pyarrow.parquet
    from fusedacl.engine import MultiExitForSequenceClassification
    from fusedacl.engine.data.batching import encode
    from fusedacl.engine.data.columns import TextSplit
    from fusedacl.engine.inference.calibration.readings import read_exits
    from fusedacl.engine.model.saved import load_tokenizer

    table = pyarrow.parquet.read_table(real_data / "trec6" / "train.parquet").to_pydict()
    order = np.random.default_rng(6).permutation(len(table["label"]))[:1600]
    texts = TextSplit(
        [table["text"][row] for row in order], None, [table["label"][row] for row in order]
    )
    model = MultiExitForSequenceClassification.from_encoder(
        str(minilm), label_names=list("abcdef"), exit_layers=[], exit_head="linear"
    )
    encoded = encode(texts, load_tokenizer(str(minilm)), 32)
    found = read_exits(model, encoded, 64, pad_token_id=0, keep_embeddings=True)
    seen, unseen = torch.arange(1600) < 800, torch.arange(1600) >= 800
    assert found.embeddings is not None
    logits = []
    for exit_ in found.embeddings:
        fitted = LogisticRegression(max_iter=200).fit(exit_[seen], found.labels[seen])
        logits.append(torch.from_numpy(fitted.decision_function(exit_[unseen])).float())
    # The last exit's embeddings are not kept: the exit before it is the full model here.
    kept = found.subset(unseen)
    return dataclasses.replace(
        kept, logits=torch.stack(logits), exit_layers=found.exit_layers[:-1], embeddings=None
    )
