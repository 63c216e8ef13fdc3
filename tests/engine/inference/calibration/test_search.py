"""Calibration: replay equals inference, targets are met, the choice is recorded."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from fusedacl.engine import MultiExitConfig, MultiExitForSequenceClassification
from fusedacl.engine.data.batching import EncodedSplit
from fusedacl.engine.inference.calibration.learned_exit import judged_by, with_learned_exit
from fusedacl.engine.inference.calibration.readings import ExitReadings, read_exits
from fusedacl.engine.inference.calibration.search import (
    SweepRow,
    Target,
    area_under_curve,
    calibration_record,
    choose,
    frontier,
    policy_grid,
    replay,
    spread_out,
    sweep,
)
from fusedacl.engine.model.early_exit import early_exit
from fusedacl.engine.model.exit_policies import (
    POLICIES,
    FixedLayer,
    Patience,
    ThresholdPolicy,
    calibration_mismatch,
)


@pytest.fixture
def readings(exit_readings: ExitReadings) -> ExitReadings:
    """Readings as in inference, with the certainties of the model's own learned exit."""
    with_learned_exit(exit_readings)
    return judged_by(exit_readings.model.learned_exit, exit_readings)


@pytest.mark.parametrize("name", POLICIES)
def test_a_sweep_says_what_inference_does(
    name: str,
    exit_model: MultiExitForSequenceClassification,
    exit_texts: EncodedSplit,
    readings: ExitReadings,
) -> None:
    policies = policy_grid(name, readings, 9)
    rows = sweep(readings, policies, "accuracy")
    layers = torch.tensor(readings.exit_layers)
    for policy, row in list(zip(policies, rows, strict=True))[:12]:
        online = early_exit(exit_model, exit_texts, policy, batch_size=7, repack=True)
        assert torch.equal(layers[replay(policy, readings)], online.exit_layers)
        accuracy = (online.predictions == exit_texts.labels).double().mean().item()
        assert row.score == pytest.approx(accuracy)
        assert row.mean_layer == pytest.approx(online.mean_layer)
        assert row.flops_share == pytest.approx(online.flops_share)
    # From the cheapest setting of the policy to the quality of the full model.
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
    return SweepRow(Patience(1), score, layer, share)


def test_the_frontier_drops_what_is_beaten() -> None:
    beaten = [row(0.6, 0.7), row(0.5, 0.6), row(0.7, 0.6)]
    kept = [row(0.2, 0.5), row(0.5, 0.7), row(0.9, 0.8)]
    assert frontier([kept[2], *kept[:2], *beaten]) == kept


def test_settings_spread_over_the_frontier() -> None:
    """Both ends and the chosen setting are kept, and the others are spread out."""
    shares = [0.1, 0.11, 0.12, 0.13, 0.3, 0.5, 0.52, 0.7, 0.9, 1.0]
    rows = [row(share, share) for share in shares]
    beaten, chosen = row(0.6, 0.2), rows[2]
    kept = spread_out([*rows[::-1], beaten], 6, chosen)
    assert [r.flops_share for r in kept] == [0.1, 0.12, 0.3, 0.5, 0.7, 1.0]
    assert spread_out(rows, 10) == rows
    # The best setting within a budget of layers need not be best in operations.
    assert [r.flops_share for r in spread_out([*rows, beaten], 4, beaten)] == [0.1, 0.3, 0.6, 1.0]
    assert spread_out(rows[:1], 3, rows[0]) == rows[:1]


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


def test_a_policy_is_stored_with_the_model(
    exit_model: MultiExitForSequenceClassification,
    exit_texts: EncodedSplit,
    readings: ExitReadings,
    tmp_path: Path,
) -> None:
    target = Target(max_quality_loss=0.05)
    rows = sweep(readings, policy_grid("entropy", readings), "accuracy")
    chosen = choose(rows, readings.score("accuracy"), target)
    facts = {"data": "random, validation", "metric": "accuracy", "target": target}
    record = calibration_record(chosen, readings, **facts, dtype=torch.float32, max_seq_length=20)
    assert record["calibration"]["full_score"] == pytest.approx(0.8)
    assert record["calibration"]["score"] >= 0.95 * 0.8
    assert record["calibration"]["target"] == {"max_quality_loss": 0.05}
    exit_model.config.exit_policy = record
    exit_model.save_pretrained(tmp_path)
    config = MultiExitConfig.from_pretrained(tmp_path)
    assert config.exit_policy == record
    before = early_exit(exit_model, exit_texts)
    exit_model.config.exit_policy = config.exit_policy
    assert torch.equal(before.exit_layers, early_exit(exit_model, exit_texts).exit_layers)


@pytest.mark.parametrize(
    ("dtype", "length", "words"),
    [
        (torch.float32, 20, None),
        (torch.bfloat16, 20, "with dtype float32, this run has dtype bfloat16:"),
        (torch.float32, 32, "with max_seq_length 20, this run has max_seq_length 32:"),
        (torch.float16, 8, "dtype float32 and max_seq_length 20, this run has dtype float16 and"),
    ],
)
def test_inference_unlike_the_calibration(
    dtype: torch.dtype, length: int, words: str | None
) -> None:
    record = {"calibration": {"dtype": "float32", "max_seq_length": 20}}
    told = calibration_mismatch(record, dtype, length)
    assert told is None if words is None else words in told
    promised = calibration_mismatch(
        {"calibration": {**record["calibration"], "guarantee": {1: 2}}}, dtype, length
    )
    assert (promised or "").count("its guarantee does not hold") == (words is not None)
    # A record without them cannot be compared.
    assert calibration_mismatch({"calibration": {"score": 0.5}}, dtype, length) is None
    assert calibration_mismatch({"name": "entropy"}, dtype, length) is None


def test_mistakes(exit_model: MultiExitForSequenceClassification, exit_texts: EncodedSplit) -> None:
    readings = read_exits(exit_model, exit_texts, 16, pad_token_id=0)
    for function, arguments, message in (
        (policy_grid, ("learned", readings), "learned needs the model's learned exit"),
        (policy_grid, ("votes", readings), "Did you mean 'voting'"),
        (policy_grid, ("entropy", readings, 2), "num_thresholds=2: at least 3"),
        (sweep, (readings, [Patience(4)], "accuracy"), "patience=4 can never be reached"),
        (sweep, (readings, [FixedLayer(1)], "acuracy"), "metric='acuracy'"),
    ):
        with pytest.raises(ValueError, match=message):
            function(*arguments)
