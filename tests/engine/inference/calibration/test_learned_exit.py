"""The learned exit: its certainties, and that none comes from a layer fitted on the text."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from fusedacl.engine.inference.calibration.learned_exit import (
    cross_fitted,
    fit_learned_exit,
    fold_of,
    judged_by,
    with_learned_exit,
)
from fusedacl.engine.inference.calibration.readings import ExitReadings
from fusedacl.engine.model.early_exit import certainty_of


def right(readings: ExitReadings) -> torch.Tensor:
    return readings.logits[:-1].argmax(dim=-1) == readings.labels


def test_it_tells_right_from_wrong(exit_readings: ExitReadings) -> None:
    head = fit_learned_exit(exit_readings)
    certainty, is_right = judged_by(head, exit_readings).certainties, right(exit_readings)
    assert certainty[is_right].mean() > certainty[~is_right].mean() + 0.05
    # The optimum of a logistic regression: the mean certainty is the share of right answers.
    assert certainty.mean().item() == pytest.approx(is_right.float().mean().item(), abs=1e-3)
    probability = certainty_of(head, exit_readings.embeddings[0, :1])
    assert 0 < probability.item() < 1


def test_no_text_is_judged_by_a_layer_fitted_on_it(exit_readings: ExitReadings) -> None:
    """Changing the label of a text does not change its own cross-fitted certainty."""
    before = cross_fitted(exit_readings).certainties
    labels = exit_readings.labels.clone()
    # Another class changes the order of the classes; the folds must stay the same.
    folds = fold_of(labels, 5)
    text = 7
    changed = dataclasses.replace(exit_readings, labels=labels)
    here = folds == folds[text]
    labels[text] = (labels[text] + 1) % 3
    head = fit_learned_exit(changed.subset(~here))
    torch.testing.assert_close(
        judged_by(head, changed.subset(here)).certainties, before[:, here], rtol=0, atol=1e-6
    )
    own = judged_by(fit_learned_exit(changed), changed).certainties[:, text]
    other = judged_by(fit_learned_exit(exit_readings), exit_readings).certainties[:, text]
    assert (own - other).abs().max() > 1e-3


def test_noise_is_not_taken_for_knowledge(exit_readings: ExitReadings) -> None:
    """On random answers a layer looks better on its own texts; cross-fitted certainties do not."""
    generator = torch.Generator().manual_seed(0)
    noise = dataclasses.replace(
        exit_readings,
        embeddings=torch.randn(exit_readings.embeddings.shape, generator=generator),
    )
    is_right = right(noise)
    own = judged_by(fit_learned_exit(noise), noise).certainties
    unseen = cross_fitted(noise).certainties
    assert own[is_right].mean() - own[~is_right].mean() > 0.15
    assert unseen[is_right].mean() - unseen[~is_right].mean() < 0.1


def test_folds_spread_every_class() -> None:
    labels = torch.tensor([0] * 50 + [1] * 11 + [2] * 4)
    folds = fold_of(labels, 3)
    assert torch.equal(folds, fold_of(labels, 3))
    assert torch.bincount(folds).tolist() == [22, 22, 21]
    for label, fewest in ((0, 16), (1, 3), (2, 1)):
        assert torch.bincount(folds[labels == label], minlength=3).min() >= fewest
    assert not torch.equal(folds, fold_of(labels, 3, seed=1))
    with pytest.raises(ValueError, match="2 texts cannot be cross-fitted in 5 folds"):
        fold_of(labels[:2], 5)


def test_the_models_own_is_fitted_on_all_texts(exit_readings: ExitReadings) -> None:
    model = exit_readings.model
    found = with_learned_exit(exit_readings)
    assert model.config.learned_exit
    torch.testing.assert_close(model.learned_exit.weight, fit_learned_exit(exit_readings).weight)
    assert torch.equal(found.certainties, cross_fitted(exit_readings).certainties)


@pytest.mark.parametrize("all_right", [True, False])
def test_nothing_to_learn(exit_readings: ExitReadings, all_right: bool) -> None:
    logits = exit_readings.logits.clone()
    labels = (exit_readings.labels + (0 if all_right else 1)) % 3
    logits[:] = 9.0 * torch.nn.functional.one_hot(labels, 3)
    readings = dataclasses.replace(exit_readings, logits=logits)
    word = "right" if all_right else "wrong"
    with pytest.raises(ValueError, match=f"exits are {word} on all 80 texts"):
        with_learned_exit(readings)
    # Within a fold it is no error: Laplace's rule on 3 exits x 80 texts.
    certainty = judged_by(fit_learned_exit(readings), readings).certainties
    expected = 241 / 242 if all_right else 1 / 242
    torch.testing.assert_close(certainty, torch.full_like(certainty, expected))


def test_readings_without_embeddings(exit_readings: ExitReadings) -> None:
    with pytest.raises(ValueError, match="use read_exits"):
        fit_learned_exit(dataclasses.replace(exit_readings, embeddings=None))
