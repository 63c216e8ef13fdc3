"""The losses of a batch against the formulas they are composed of."""

from __future__ import annotations

import pytest
import torch
from fusedacl.engine.config.sections import ObjectiveOptions
from fusedacl.engine.model.multi_exit import MultiExitOutput
from fusedacl.engine.objectives.losses import (
    ExitLosses,
    check_finite,
    count_not_finite,
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
    options = ObjectiveOptions(
        objective=objective,
        temperature=0.3,
        contrastive_reduction="sum",
        denominator="others",
    )
    losses = exit_losses(options, output, label_embeddings, labels)
    settings = {"temperature": 0.3, "reduction": "sum", "denominator": "others"}
    for index in range(NUM_EXITS):
        expected = functional.cross_entropy(output.exit_logits[index], labels)
        torch.testing.assert_close(losses.main[index], expected)
        embeddings = output.exit_embeddings[index]
        if objective == "ce":
            assert losses.auxiliary is None
        elif objective == "scl":
            expected = supcon_loss(embeddings, labels, **settings)
            torch.testing.assert_close(losses.auxiliary[index], expected)
        else:
            expected = acl_loss(embeddings, labels, label_embeddings[index], **settings)
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
