"""The words of a trial's answer, from made-up scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fusedacl.engine.experiments.results import Seeds
from fusedacl.engine.experiments.trial.answer import Verdict, answer
from scipy.stats import t


def verdict(differences: list[float], min_gain: float = 0.5, learned: bool = True) -> Verdict:
    """That of a method with these differences to CE in points, one per draw."""
    base = Seeds({draw: 0.7 + 0.02 * draw for draw in range(len(differences))})
    scores = {draw: base.values[draw] + gain / 100 for draw, gain in enumerate(differences)}
    return Verdict("ACL", Seeds(scores).compare(base), min_gain, learned)


def flags(draws: int) -> str:
    return f"<{draws}>"


def test_pays() -> None:
    assert verdict([1.0, 1.2, 1.4]).words(flags) == (
        "ACL over CE: +1.2 points (95 % interval +0.7 to +1.7, 3 draws): pays."
    )


def test_does_not_pay() -> None:
    assert verdict([-1.0, -1.2, -1.4]).words(flags) == (
        "ACL over CE: -1.2 points (95 % interval -1.7 to -0.7, 3 draws): does not pay. The "
        "gain, if there is any, is less than 0.5 points."
    )
    small = [0.2, 0.21, 0.22]
    assert (
        verdict(small)
        .words(flags)
        .endswith("does not pay. There is a gain, but it is less than 0.5 points.")
    )
    # With no smallest gain, the interval has to leave out 0.
    assert verdict(small, min_gain=0.0).word == "pays"


@pytest.mark.parametrize("difference", [0.0, -2.0, 5.0])
def test_equal_differences_say_nothing_of_the_spread(difference: float) -> None:
    """As of two draws that differ by one text of twenty each."""
    found = verdict([difference] * 2)
    assert found.words(flags).endswith(
        "2 draws): not clear, as all draws have the same difference, which says nothing of the "
        "spread. For another one: <3>."
    )


@pytest.mark.parametrize("differences", [[2.0, 0.0, 1.5, 0.1], [0.4, -0.8, 1.0, 0.1]])
def test_not_clear_says_how_many_draws_it_takes(differences: list[float]) -> None:
    found = verdict(differences)
    assert found.word == "not clear"
    needed, number = found.draws_needed, len(differences)
    assert needed is not None
    half, difference = found.comparison.half_width, found.comparison.difference
    assert half is not None

    def decides(draws: int) -> bool:
        quantiles = [float(t.ppf(0.975, n - 1)) / n**0.5 for n in (draws, number)]
        width = half * quantiles[0] / quantiles[1]
        return difference - width > 0 or difference + width < found.min_gain

    assert decides(needed) and not decides(needed - 1)
    assert found.words(flags).endswith(
        f"4 draws): not clear. If mean and spread stay, {needed} draws make it clear: <{needed}>."
    )


def test_more_draws_than_anyone_runs() -> None:
    found = verdict([30.0, -29.5, 0.3])
    assert found.draws_needed is None
    assert "more than 1,000 draws would be needed" in found.words(flags)


def test_one_draw_has_no_interval() -> None:
    assert verdict([1.5]).words(flags) == (
        "ACL over CE: +1.5 points in a single draw, which has no interval: not clear. For a second "
        "one: <2>."
    )


def test_nothing_was_learned() -> None:
    assert verdict([0.0, 0.0], learned=False).words(flags) == (
        "ACL over CE: +0.0 points (95 % interval +0.0 to +0.0, 2 draws): not clear, as nothing was "
        "learned."
    )


def test_the_whole_answer(make_world: Any, opinions: Any, start: Any, tmp_path: Path) -> None:
    world = make_world(scores={"CE": [0.8], "CE+SCL": [0.8], "ACL": [0.82, 0.84, 0.81]})
    trial = start(world, opinions(), tmp_path / "try")
    assert trial.run() == [] and len(trial.draws) == 3
    assert answer(trial, 0.5) == [
        "opinions: 3 draws of 64 training texts, 10 steps a run, evaluated on 24 texts.",
        "accuracy in percent: CE 80.0 ± 0.0, CE+SCL 80.0 ± 0.0, ACL 82.3 ± 1.5.",
        "ACL over CE: +2.3 points (95 % interval -1.5 to +6.1, 3 draws): not clear. If mean and "
        "spread stay, 5 draws make it clear: --minutes 7.",
        "CE+SCL over CE: +0.0 points (95 % interval +0.0 to +0.0, 3 draws): not clear, as all "
        "draws have the same difference, which says nothing of the spread. For another one: "
        "--minutes 6.",
        "Price: a step of ACL 2.00 times, a step of CE+SCL 1.00 times as long as one of CE.",
        "The gate dropped 25.0% of 30 contrastive gradients; mean angle 80 degrees.",
    ]
    # Half of the texts have each label.
    world.scores = {method: [0.51] for method in world.scores}
    for run in (tmp_path / "try" / "cells").rglob("results.json"):
        method = {"ce": "CE", "acl": "ACL", "ce-scl": "CE+SCL"}[run.parent.parent.name]
        world.write_results(run.parent, method, 1, 10, {})
    words = " ".join(answer(trial, 0.5))
    assert "The same answer to all texts would score 50.0: the runs have learned too" in words
    assert words.count("not clear, as nothing was learned") == 2
