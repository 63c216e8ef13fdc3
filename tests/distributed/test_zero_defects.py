"""Defects of plain DeepSpeed with two backward passes, which fusedacl works around.

A failure here means that a version of DeepSpeed behaves differently: see what `stages` and
`backend` do about it before the versions in `gradients.SUPPORTED` are changed.
"""

from __future__ import annotations

import pytest

pytest.importorskip("deepspeed")

from rank_pool import Ranks
from stock_cases import (
    first_moments,
    growth_step,
    left_over,
    retained_graph,
    two_passes,
    unscaled_step,
)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_first_of_two_gradients_is_dropped(zero_ranks: Ranks, stage: int) -> None:
    for distance in zero_ranks.run(two_passes, stage):
        assert distance["main"] < 1e-5
        assert distance["sum"] > 0.1


def test_without_zero_a_second_pass_averages_the_first_again(zero_ranks: Ranks) -> None:
    """The first gradient is reduced with the second: a mean of means, so nothing is lost here."""
    for distance in zero_ranks.run(two_passes, 0):
        assert distance["sum"] < 1e-5


def test_zero_3_cannot_go_through_a_graph_twice(zero_ranks: Ranks) -> None:
    for message in zero_ranks.run(retained_graph):
        assert message


def test_without_zero_the_loss_is_not_scaled_but_the_step_unscales(zero_ranks: Ranks) -> None:
    for share in zero_ranks.run(unscaled_step):
        assert share == pytest.approx(1 / 256, rel=0.05)


def test_zero_3_applies_an_old_gradient_where_there_is_none(zero_ranks: Ranks) -> None:
    for moved in zero_ranks.run(left_over):
        assert moved > 0


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_growing_scale_divides_the_gradients_that_the_old_one_scaled(
    zero_ranks: Ranks, stage: int
) -> None:
    for norms in zero_ranks.run(growth_step, stage):
        assert min(norms) == pytest.approx(max(norms) / 2, rel=0.05)


def test_without_zero_adamw_has_taken_a_step_before_the_first(zero_ranks: Ranks) -> None:
    for counted, decayed in zero_ranks.run(first_moments):
        assert counted == 1
        assert decayed == pytest.approx(0.05, rel=0.1)
