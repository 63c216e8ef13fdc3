"""The learned temperature: its gradient, when it rests, its bounds and its state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fusedacl.engine.config.sections import LEARNED_TEMPERATURES, ObjectiveOptions
from fusedacl.engine.model.multi_exit import MultiExitOutput
from fusedacl.engine.objectives.large_batches import Chunk, cached_losses
from fusedacl.engine.objectives.temperature import LearnedTemperature
from fusedacl.kernels import acl_loss
from torch import Tensor

CPU = torch.device("cpu")
START, RATE = 0.4, 0.05


def learned(start: float = START, rate: float = RATE) -> LearnedTemperature:
    return LearnedTemperature(start, rate, CPU)


def batch(num_exits: int, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Samples [E, N, d], label embeddings [E, K, d] and labels [N]."""
    rows, weights = torch.randn(num_exits, number, 6), torch.randn(num_exits, 3, 6)
    return rows.double(), weights.double(), torch.arange(number) % 3


def losses_of(
    rows: Tensor, weights: Tensor, labels: Tensor, sizes: list[int], **settings: Any
) -> list[Any]:
    chunks = [
        Chunk(
            MultiExitOutput(
                exit_logits=torch.zeros(len(part), part.shape[1], 3, requires_grad=True),
                exit_embeddings=part,
            ),
            truth,
            None,
        )
        for part, truth in zip(rows.split(sizes, dim=1), labels.split(sizes), strict=True)
    ]
    forwards = [lambda chunk=chunk: chunk for chunk in chunks]
    options = ObjectiveOptions(objective="acl", temperature=START)
    return list(
        cached_losses(
            forwards, lambda: weights, options, shares=[1.0] * len(sizes), device=CPU, **settings
        )
    )


# With as many exits as samples [E] temperatures could be [N] ones.
@pytest.mark.parametrize(
    ("num_exits", "sizes"), [(1, [7]), (1, [1]), (3, [7]), (3, [3]), (2, [4, 3])]
)
def test_gradients_are_those_of_the_loss(num_exits: int, sizes: list[int]) -> None:
    """Of the temperature, the samples and the label embeddings, with a loss scale and a share."""
    rows, weights, labels = batch(num_exits, sum(sizes))
    rows.requires_grad_(), weights.requires_grad_()
    temperature = learned()
    found = losses_of(
        rows, weights, labels, sizes, weight=0.5, loss_scale=64.0, temperature=temperature
    )
    ours = torch.autograd.grad(sum(one.auxiliary.sum() for one in found), [rows, weights])
    tau = torch.full((num_exits, 1), START, dtype=torch.float64, requires_grad=True)
    expected = [
        0.5 * acl_loss(rows[e], labels, weights[e], temperature=tau[e, 0], impl="reference")
        for e in range(num_exits)
    ]
    total = torch.stack(expected)
    torch.testing.assert_close(sum(one.auxiliary for one in found), total)
    *theirs, of_tau = torch.autograd.grad(total.sum(), [rows, weights, tau])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    # d tau / d log(1 / tau) is -tau.
    expected_gradient = -START * of_tau[:, 0]
    torch.testing.assert_close(
        temperature._gradient.double(), expected_gradient, rtol=1e-4, atol=1e-6
    )


def moved(weights: list[float], skipped: Any, gradient: list[float]) -> float:
    temperature = learned()
    temperature.add_gradient(torch.tensor(gradient))
    temperature.step(torch.tensor(weights), skipped)
    return float(temperature.value / learned().value)


def test_a_step_moves_it_by_the_rate() -> None:
    # The first step of Adam has the length of the rate; a positive gradient raises tau.
    assert moved([0.02], False, [3.0]) == pytest.approx(1.05, rel=2e-3)
    assert moved([0.02], torch.tensor(False), [-3.0]) == pytest.approx(1 / 1.05, rel=2e-3)
    # The exits that kept their term decide.
    assert moved([0.0, 0.02], False, [3.0, -1.0]) < 1
    assert moved([0.02, 0.02], False, [3.0, -1.0]) > 1


def test_it_rests_where_its_gradient_does_not_count() -> None:
    assert moved([0.0, 0.0], False, [3.0, -1.0]) == 1
    assert moved([0.02], True, [3.0]) == 1
    assert moved([0.02], torch.tensor(True), [3.0]) == 1
    assert moved([0.02], False, [float("nan")]) == 1
    temperature = learned()
    temperature.step(torch.tensor([0.02]), False)  # no contrastive batch
    assert temperature.value == learned().value
    # Neither do the moments or their count move.
    for gradient, weight in ((1.0, 0.02), (5.0, 0.0), (-2.0, 0.02)):
        temperature.add_gradient(torch.tensor([gradient]))
        temperature.step(torch.tensor([weight]), False)
    other = learned()
    for gradient in (1.0, -2.0):
        other.add_gradient(torch.tensor([gradient]))
        other.step(torch.tensor([0.02]), False)
    assert torch.equal(temperature.value, other.value)


@pytest.mark.parametrize(("gradient", "bound"), [(1.0, 1), (-1.0, 0)])
def test_it_stays_within_its_bounds(gradient: float, bound: int) -> None:
    temperature = learned(rate=2.0)
    for _ in range(5):
        temperature.add_gradient(torch.tensor([gradient]))
        temperature.step(torch.tensor([1.0]), False)
    assert float(temperature.value) == pytest.approx(LEARNED_TEMPERATURES[bound])


def test_it_continues_bitwise() -> None:
    whole, other = learned(), learned(start=3.0)
    for step in range(4):
        if step == 2:
            other.load_state_dict(copy.deepcopy(whole.state_dict()))
        for temperature in (whole, other):
            temperature.add_gradient(torch.tensor([(-1.0) ** step * (step + 1)]))
            temperature.step(torch.tensor([0.02]), False)
    assert torch.equal(whole.value, other.value)
