"""The losses of a batch against the formulas they are composed of."""

from typing import Any

import pytest
import torch
from fusedacl.engine.config.sections import ObjectiveOptions
from fusedacl.engine.model.answers import IGNORED
from fusedacl.engine.model.multi_exit import MultiExitOutput
from fusedacl.engine.objectives.losses import (
    ExitLosses,
    Teacher,
    check_finite,
    count_not_finite,
    distillation,
    exit_losses,
)
from fusedacl.kernels import acl_loss, supcon_loss
from torch.nn import functional

NUM_EXITS, NUM_SAMPLES, NUM_LABELS, WIDTH = 2, 7, 3, 5


@pytest.fixture
def batch() -> tuple[MultiExitOutput, torch.Tensor, torch.Tensor]:
    output = MultiExitOutput(
        exit_logits=torch.randn(NUM_EXITS, NUM_SAMPLES, NUM_LABELS),
        exit_embeddings=torch.randn(NUM_EXITS, NUM_SAMPLES, WIDTH),
    )
    label_embeddings = torch.randn(NUM_EXITS, NUM_LABELS, WIDTH)
    return output, label_embeddings, torch.randint(NUM_LABELS, (NUM_SAMPLES,))


@pytest.mark.parametrize("objective", ["ce", "scl", "acl"])
def test_each_exit_has_its_own_losses(batch, objective: str) -> None:
    output, label_embeddings, labels = batch
    common = {"temperature": 0.3, "denominator": "others"}
    options = ObjectiveOptions(objective=objective, contrastive_reduction="sum", **common)
    losses = exit_losses(options, output, label_embeddings, labels)
    settings = {**common, "reduction": "sum"}
    for index in range(NUM_EXITS):
        expected = functional.cross_entropy(output.exit_logits[index], labels)
        torch.testing.assert_close(losses.main[index], expected)
        if objective == "ce":
            assert losses.auxiliary is None
            continue
        contrasted = (output.exit_embeddings[index], labels)
        if objective == "scl":
            expected = supcon_loss(*contrasted, **settings)
        else:
            expected = acl_loss(*contrasted, label_embeddings[index], **settings)
        torch.testing.assert_close(losses.auxiliary[index], expected)


def test_weighted_sum() -> None:
    losses = ExitLosses(torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0]))
    assert losses.weighted(0.1).item() == pytest.approx(0.9 * 3 + 0.1 * 30)
    assert ExitLosses(torch.tensor([1.0, 2.0]), None).weighted(0.1).item() == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_representations_are_named_with_the_step(batch, value: float) -> None:
    output, _, _ = batch
    check_finite(count_not_finite(output).tolist(), 7, step=3)
    output.exit_embeddings[1, 4, 2] = value
    output.exit_embeddings[1, 6, 0] = value
    message = "Step 12: the representations of 2 of 7 samples at exit 2 of 2"
    with pytest.raises(FloatingPointError, match=message):
        check_finite(count_not_finite(output).tolist(), 7, step=12)


OBJECTIVES: dict[str, dict[str, Any]] = {
    "ce": {"objective": "ce"},
    "scl": {"objective": "scl"},
    "acl": {"objective": "acl"},
    "acl_cl": {"objective": "acl", "cross_layer": True, "distill_weight": 0.3},
}


def teacher() -> Teacher:
    shapes = ((NUM_SAMPLES, WIDTH), (NUM_LABELS, WIDTH), (NUM_SAMPLES, NUM_LABELS))
    return Teacher(*(torch.randn(*shape) for shape in shapes))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_label_each_written_as_several_is_contrasted_alike(batch, objective: str) -> None:
    output, label_embeddings, labels = batch
    options, constants = ObjectiveOptions(**OBJECTIVES[objective]), teacher()
    several = functional.one_hot(labels, NUM_LABELS).bool()
    expected, found = (
        exit_losses(options, output, label_embeddings, wanted, constants)
        for wanted in (labels, several)
    )
    torch.testing.assert_close(found.auxiliary, expected.auxiliary)
    assert found.cross_entropy is not None
    each = [
        functional.binary_cross_entropy_with_logits(logits, several.float())
        for logits in output.exit_logits
    ]
    torch.testing.assert_close(found.cross_entropy, torch.stack(each))


@pytest.mark.parametrize("positives", ["overlap", "each"])
def test_which_texts_are_drawn_together_is_said_to_the_loss(batch, positives: str) -> None:
    output, label_embeddings, _ = batch
    labels = torch.rand(NUM_SAMPLES, NUM_LABELS) < 0.6
    options = ObjectiveOptions(objective="acl", positives=positives)
    found = exit_losses(options, output, label_embeddings, labels).auxiliary
    expected = acl_loss(output.exit_embeddings, labels, label_embeddings, positives=positives)
    torch.testing.assert_close(found, expected)
    other = "each" if positives == "overlap" else "overlap"
    different = acl_loss(output.exit_embeddings, labels, label_embeddings, positives=other)
    assert not torch.allclose(expected, different)


@pytest.mark.parametrize("objective", ["scl", "acl", "acl_cl"])
def test_a_text_that_is_ignored_is_in_no_contrastive_batch(batch, objective: str) -> None:
    output, label_embeddings, _ = batch
    options, constants = ObjectiveOptions(**OBJECTIVES[objective]), teacher()
    labels = torch.randint(2, (NUM_SAMPLES, NUM_LABELS)).float()
    labels[-1] = IGNORED
    found = exit_losses(options, output, label_embeddings, labels, constants)
    fewer = MultiExitOutput(
        exit_logits=output.exit_logits[:, :-1], exit_embeddings=output.exit_embeddings[:, :-1]
    )
    constants = Teacher(
        constants.embeddings[:-1], constants.label_embeddings, constants.logits[:-1]
    )
    expected = exit_losses(options, fewer, label_embeddings, labels[:-1], constants)
    torch.testing.assert_close(found.auxiliary, expected.auxiliary)


def test_distillation_of_several_labels() -> None:
    logits = torch.randn(NUM_EXITS, NUM_SAMPLES, NUM_LABELS, requires_grad=True)
    wanted = torch.randn(NUM_SAMPLES, NUM_LABELS)
    found = distillation(logits, wanted, 2.0, several=True)
    p, q = torch.sigmoid(wanted / 2), torch.sigmoid(logits / 2)
    divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(found, 4 * divergence.mean(dim=(1, 2)))
    same = wanted.expand_as(logits).clone().requires_grad_()
    value = distillation(same, wanted, 2.0, several=True)
    torch.testing.assert_close(value, torch.zeros(NUM_EXITS), atol=1e-6, rtol=0)
    extreme = distillation(torch.full((1, 1, 2), 1e4), torch.full((1, 2), -1e4), 1.0, several=True)
    assert extreme.isfinite().all()
