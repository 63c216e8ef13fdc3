"""The cross-fitted score: computed by hand, free of optimism, and errors."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from fusedacl.engine.inference.calibration.cross_fitting import cross_fit
from fusedacl.engine.inference.calibration.learned_exit import fold_of, with_learned_exit
from fusedacl.engine.inference.calibration.readings import ExitReadings
from fusedacl.engine.inference.calibration.search import Target, choose, policy_grid, replay, sweep
from fusedacl.engine.model.exit_policies import POLICIES

TARGET = Target(max_quality_loss=0.1)


def test_each_half_has_the_setting_that_the_other_chose(exit_readings: ExitReadings) -> None:
    found = cross_fit("entropy", exit_readings, "accuracy", TARGET, num_thresholds=9)
    folds = fold_of(exit_readings.labels, 2)
    right, layers, flops = 0.0, 0.0, 0.0
    for here in (folds == 0, folds == 1):
        other, half = exit_readings.subset(~here), exit_readings.subset(here)
        rows = sweep(other, policy_grid("entropy", other, 9), "accuracy")
        policy = choose(rows, other.score("accuracy"), TARGET).policy
        scored = sweep(half, [policy], "accuracy")[0]
        right += scored.score * len(half)
        layers += scored.mean_layer * len(half)
        full = sum(half.lengths)
        flops += scored.flops_share * full
    assert found.score == pytest.approx(right / 80)
    assert found.mean_layer == pytest.approx(layers / 80)
    # The shares of the halves are weighted by operations, here nearly proportional to tokens.
    assert found.flops_share == pytest.approx(float(flops / sum(exit_readings.lengths)), rel=0.02)
    assert found.num_folds == 2


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_can_be_cross_fitted(name: str, exit_readings: ExitReadings) -> None:
    readings = with_learned_exit(exit_readings) if name == "learned" else exit_readings
    options = {"target": Target(max_mean_layer=3.5), "num_thresholds": 9}
    found, again = (cross_fit(name, readings, "accuracy", **options) for _ in range(2))
    assert 0 < found.score <= 1 and 1 <= found.mean_layer <= 4 and 0 < found.flops_share < 2
    assert found == again


@pytest.mark.parametrize("name", ["max_probability", "learned"])
def test_choosing_among_noise_gains_nothing_elsewhere(
    name: str, exit_readings: ExitReadings
) -> None:
    """With random exits, the best of many thresholds looks better than it is."""
    gains, unseen = [], []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        readings = dataclasses.replace(
            exit_readings,
            logits=torch.randn(exit_readings.logits.shape, generator=generator),
            embeddings=torch.randn(exit_readings.embeddings.shape, generator=generator),
            labels=torch.arange(80) % 3,
        )
        if name == "learned":
            readings = with_learned_exit(readings)
        target = Target(max_mean_layer=4)
        chosen = choose(sweep(readings, policy_grid(name, readings), "accuracy"), 1 / 3, target)
        gains.append(chosen.score - 1 / 3)
        unseen.append(cross_fit(name, readings, "accuracy", target).score - 1 / 3)
    assert sum(gains) / 8 > 0.02
    assert abs(sum(unseen) / 8) < 0.04
    assert sum(unseen) < sum(gains)


def test_when_it_cannot_be_had(exit_readings: ExitReadings) -> None:
    with pytest.raises(ValueError, match="1 texts cannot be cross-fitted in 2 folds"):
        cross_fit("entropy", exit_readings.subset(torch.tensor([0])), "accuracy", TARGET)
    with pytest.raises(ValueError, match="no setting is as fast"):
        cross_fit("patience", exit_readings, "accuracy", Target(max_mean_layer=1))
    few = exit_readings.subset(torch.arange(8))
    with pytest.raises(ValueError, match="4 texts cannot be cross-fitted in 5 folds"):
        cross_fit("learned", few, "accuracy", TARGET)
    assert len(replay(policy_grid("voting", few)[0], few)) == 8
