"""Calibration: replay equals inference, targets are met, the learned exit learns."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fusedacl.engine import MultiExitConfig, MultiExitForSequenceClassification
from fusedacl.engine.batching import EncodedSplit
from fusedacl.engine.calibration import (
    ExitReadings,
    SweepRow,
    Target,
    area_under_curve,
    calibration_record,
    choose,
    fit_learned_exit,
    frontier,
    policy_grid,
    read_exits,
    replay,
    store_policy,
    sweep,
)
from fusedacl.engine.early_exiting import certainty_of, early_exit
from fusedacl.engine.exit_policies import (
    POLICIES,
    FixedLayer,
    MaximumProbability,
    Patience,
    ThresholdPolicy,
)
from transformers import BertConfig

NUM_TEXTS = 80


@pytest.fixture
def model() -> MultiExitForSequenceClassification:
    config = MultiExitConfig(
        BertConfig(
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=48,
            vocab_size=60,
            max_position_embeddings=40,
        ),
        exit_layers=[1, 2, 3, 4],
        exit_head="mha",
        num_labels=3,
    )
    model = MultiExitForSequenceClassification(config).eval()
    with torch.no_grad():
        words = model.backbone.embeddings.word_embeddings.weight
        words.copy_(torch.randn(words.shape, generator=torch.Generator().manual_seed(1)))
    return model


@pytest.fixture
def encoded(model: MultiExitForSequenceClassification) -> EncodedSplit:
    """Random texts with the full model's answers as labels, every fifth of them wrong."""
    random = np.random.default_rng(3)
    lengths = random.integers(2, 20, NUM_TEXTS)
    values: dict[str, Any] = {
        "tokens": random.integers(5, 60, lengths.sum()).astype(np.int32),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "token_types": None,
        "num_truncated": 0,
        "max_length": 20,
    }
    answers = early_exit(model, EncodedSplit(labels=None, **values), FixedLayer(4)).predictions
    answers[::5] = (answers[::5] + 1) % 3
    return EncodedSplit(labels=answers, **values)


@pytest.fixture
def readings(model: MultiExitForSequenceClassification, encoded: EncodedSplit) -> ExitReadings:
    fit_learned_exit(model, encoded, 16, pad_token_id=0)
    return read_exits(model, encoded, 16, pad_token_id=0)


@pytest.mark.parametrize("name", POLICIES)
def test_a_sweep_says_what_inference_does(
    name: str,
    model: MultiExitForSequenceClassification,
    encoded: EncodedSplit,
    readings: ExitReadings,
) -> None:
    policies = policy_grid(name, readings, 9)
    rows = sweep(readings, policies, "accuracy")
    layers = torch.tensor(readings.exit_layers)
    for policy, row in list(zip(policies, rows, strict=True))[:12]:
        online = early_exit(model, encoded, policy, batch_size=7, repack=True)
        assert torch.equal(layers[replay(policy, readings)], online.exit_layers)
        accuracy = (online.predictions == encoded.labels).double().mean().item()
        assert row.score == pytest.approx(accuracy)
        assert row.mean_layer == pytest.approx(online.mean_layer)
        assert row.flops_share == pytest.approx(online.flops_share)
        assert row.exit_counts == {
            layer: int((online.exit_layers == layer).sum()) for layer in (1, 2, 3, 4)
        }
    # From the cheapest the policy can do to the full model's quality.
    assert max(row.mean_layer for row in rows) == 4
    if name not in ("patience", "patience_confidence"):
        assert min(row.mean_layer for row in rows) == 1
    assert any(1 < row.mean_layer < 4 for row in rows)


def test_thresholds_lie_clear_of_the_signals(readings: ExitReadings) -> None:
    for name in ("max_probability", "entropy", "learned"):
        grid = policy_grid(name, readings, 9)
        signals = torch.cat([POLICIES[name].signal(readings.at(index)) for index in range(3)])
        for policy in grid:
            assert isinstance(policy, ThresholdPolicy)
            assert (signals - policy.threshold).abs().min() > 2e-6 or policy.threshold in (0, 1)
        assert [policy.threshold for policy in grid] == sorted({p.threshold for p in grid})
        assert len(grid) == 9


def row(share: float, score: float, layer: float = 1) -> SweepRow:
    return SweepRow(Patience(1), score, layer, share, {})


def test_the_frontier_drops_what_is_beaten() -> None:
    rows = [
        row(0.9, 0.8),
        row(0.2, 0.5),
        row(0.5, 0.7),
        row(0.6, 0.7),
        row(0.5, 0.6),
        row(0.7, 0.6),
    ]
    assert [(r.flops_share, r.score) for r in frontier(rows)] == [
        (0.2, 0.5),
        (0.5, 0.7),
        (0.9, 0.8),
    ]


def test_choosing() -> None:
    rows = [row(0.2, 0.5, 1), row(0.5, 0.79, 2), row(0.6, 0.795, 3), row(1.0, 0.8, 4)]
    assert choose(rows, 0.8, Target(max_quality_loss=0.0)) == rows[3]
    assert choose(rows, 0.8, Target(max_quality_loss=0.0125)) == rows[1]
    assert choose(rows, 0.8, Target(max_quality_loss=1.0)) == rows[0]
    assert choose(rows, 0.8, Target(max_mean_layer=3.5)) == rows[2]
    assert choose(rows, 0.8, Target(max_flops_share=0.55)) == rows[1]
    # A relative loss of a negative score is a loss too.
    assert choose([row(0.2, -0.2), row(1, -0.1)], -0.1, Target(max_quality_loss=0.5)).score == -0.1
    with pytest.raises(ValueError, match="max_flops_share=0.1: no setting is as fast.*with 0.2"):
        choose(rows, 0.8, Target(max_flops_share=0.1))
    with pytest.raises(ValueError, match="no setting scores 0.8910 or more.*with 0.8000"):
        choose(rows, 0.9, Target(max_quality_loss=0.01))
    with pytest.raises(ValueError, match="rows is empty"):
        choose([], 0.9, Target(max_quality_loss=0.01))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no target: give exactly one of max_quality_loss"),
        ({"max_mean_layer": 3, "max_quality_loss": 0.1}, "max_quality_loss and max_mean_layer"),
        ({"max_quality_loss": -0.1}, "max_quality_loss=-0.1 is out of range: .* from 0 to 1"),
        ({"max_flops_share": math.nan}, "max_flops_share=nan"),
        ({"max_mean_layer": -1}, "max_mean_layer=-1 is out of range: .* 0 or more"),
    ],
)
def test_wrong_targets(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Target(**options)


def test_area_under_the_curve_by_hand(readings: ExitReadings) -> None:
    first = sweep(readings, [FixedLayer(1)], "accuracy")[0]
    share, worst = first.flops_share, first.score
    assert area_under_curve([], readings, "accuracy") == pytest.approx(worst)
    middle = (1 + share) / 2
    rows = [row(middle, worst + 0.1), row((1 + middle) / 2, worst + 0.05), row(1.2, 1.0)]
    assert area_under_curve(rows, readings, "accuracy") == pytest.approx(worst + 0.05)


def test_the_learned_exit_tells_right_from_wrong(
    model: MultiExitForSequenceClassification, encoded: EncodedSplit
) -> None:
    head = fit_learned_exit(model, encoded, 16, pad_token_id=0)
    assert model.learned_exit is head
    assert model.config.learned_exit
    readings = read_exits(model, encoded, 16, pad_token_id=0)
    is_right = readings.logits[:-1].argmax(dim=-1) == encoded.labels
    certainty = readings.certainties[:-1]
    assert certainty[is_right].mean() > certainty[~is_right].mean() + 0.05
    # The optimum of a logistic regression: the mean certainty is the share of right answers.
    assert certainty.mean().item() == pytest.approx(is_right.float().mean().item(), abs=1e-3)
    output = model(torch.tensor([[5, 6, 7]]))
    assert 0 < certainty_of(head, output.exit_embeddings[0]).item() < 1


def test_a_policy_is_stored_with_the_model(
    model: MultiExitForSequenceClassification,
    encoded: EncodedSplit,
    readings: ExitReadings,
    tmp_path: Path,
) -> None:
    target = Target(max_quality_loss=0.05)
    chosen = choose(
        sweep(readings, policy_grid("entropy", readings), "accuracy"),
        readings.score("accuracy"),
        target,
    )
    record = calibration_record(
        chosen, readings, data="random, validation", metric="accuracy", target=target
    )
    assert record["calibration"]["full_score"] == pytest.approx(0.8)
    assert record["calibration"]["score"] >= 0.95 * 0.8
    assert record["calibration"]["target"] == {"max_quality_loss": 0.05}
    store_policy(model, record)
    model.save_pretrained(tmp_path)
    config = MultiExitConfig.from_pretrained(tmp_path)
    assert config.exit_policy == record
    before = early_exit(model, encoded)
    model.config.exit_policy = config.exit_policy
    assert torch.equal(before.exit_layers, early_exit(model, encoded).exit_layers)


def test_mistakes(model: MultiExitForSequenceClassification, encoded: EncodedSplit) -> None:
    readings = read_exits(model, encoded, 16, pad_token_id=0)
    with pytest.raises(ValueError, match="learned needs the model's learned exit"):
        policy_grid("learned", readings)
    with pytest.raises(ValueError, match="Did you mean 'voting'"):
        policy_grid("votes", readings)
    with pytest.raises(ValueError, match="num_thresholds=2: at least 3"):
        policy_grid("entropy", readings, 2)
    with pytest.raises(ValueError, match="patience=4 can never be reached"):
        sweep(readings, [Patience(4)], "accuracy")
    with pytest.raises(ValueError, match="metric='acuracy'"):
        sweep(readings, [MaximumProbability(0.5)], "acuracy")
    unlabelled = EncodedSplit(**{**vars(encoded), "labels": None})
    with pytest.raises(ValueError, match="has no labels"):
        read_exits(model, unlabelled, 16, pad_token_id=0)
    answers = EncodedSplit(**{**vars(encoded), "labels": torch.full((NUM_TEXTS,), 7)})
    with pytest.raises(ValueError, match="exits are wrong on all 80 texts"):
        fit_learned_exit(model, answers, 16, pad_token_id=0)
