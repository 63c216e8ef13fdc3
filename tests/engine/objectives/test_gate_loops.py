"""The gate on models and in loops as people have them: scaled, compiled, checkpointed, adapted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from fusedacl.engine import GradientGate
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Encoder(nn.Module):
    """A tied weight, a frozen one, and a part whose activations may be recomputed."""

    def __init__(self, use_reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(11, 6)
        self.query, self.value = nn.Linear(6, 6), nn.Linear(6, 6)
        self.guess = nn.Linear(6, 11, bias=False)
        self.guess.weight = self.words.weight
        self.value.bias.requires_grad_(False)
        self.use_reentrant = use_reentrant
        self.double()

    def middle(self, hidden: Tensor) -> Tensor:
        return torch.tanh(self.value(torch.tanh(self.query(hidden))))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.words(ids)
        if self.use_reentrant is None:
            hidden = self.middle(hidden)
        else:
            hidden = checkpoint(self.middle, hidden, use_reentrant=self.use_reentrant)
        return hidden, self.guess(hidden)


IDS = torch.arange(22).view(2, 11) % 11


def losses(model: Callable[..., Any]) -> tuple[Tensor, Tensor]:
    hidden, logits = model(IDS)
    return nn.functional.cross_entropy(logits.flatten(0, 1), IDS.flatten()), hidden.sin().mean()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def gradients_of(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in trained(model)]


@pytest.fixture
def expected() -> list[Tensor]:
    """Gradients of the plain model, by hand."""
    model = Encoder()
    main, auxiliary = (
        torch.autograd.grad(loss, trained(model), retain_graph=True) for loss in losses(model)
    )
    return [0.7 * left + 0.3 * right for left, right in zip(main, auxiliary, strict=True)]


def gated(model: nn.Module, call: Callable[..., Any] | None = None) -> None:
    gate = GradientGate(trained(model), weight=0.3, max_angle=180)
    gate.backward(*losses(model if call is None else call))


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_tied_frozen_and_recomputed(expected: list[Tensor], use_reentrant: bool | None) -> None:
    model = Encoder(use_reentrant)
    gated(model)
    torch.testing.assert_close(gradients_of(model), expected)
    assert model.value.bias.grad is None


@pytest.fixture
def compiled() -> Iterator[Callable[[nn.Module], Callable[..., Any]]]:
    yield partial(torch.compile, backend="aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("use_reentrant", [None, False])
def test_a_compiled_model(
    compiled: Callable[[nn.Module], Callable[..., Any]],
    expected: list[Tensor],
    use_reentrant: bool | None,
) -> None:
    model = Encoder(use_reentrant)
    gated(model, compiled(model))
    torch.testing.assert_close(gradients_of(model), expected)


@pytest.mark.parametrize("kept", [False, True])
def test_a_model_compiled_for_one_backward_pass(
    compiled: Callable[[nn.Module], Callable[..., Any]], expected: list[Tensor], kept: bool
) -> None:
    from torch._functorch import config

    model = Encoder()
    with config.patch(donated_buffer=not kept):
        call = compiled(model)
        losses(call)[0].backward()
        model.zero_grad()
        if kept:
            gated(model, call)
            torch.testing.assert_close(gradients_of(model), expected)
        else:
            with pytest.raises(ValueError, match="donated_buffer = False before its first"):
                gated(model, call)


@pytest.mark.parametrize("which", [0, 1])
def test_a_grad_scaler_skips_an_overflow_of_either_loss(which: int) -> None:
    model = Encoder()
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    gate = GradientGate(trained(model), weight=0.3, max_angle=180)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    weights, scales = [model.query.weight.detach().clone()], []
    for step in range(4):
        both = [scaler.scale(loss) for loss in losses(model)]
        if step == 1:
            both[which] = both[which] * torch.inf
        decision = gate.backward(*both)
        assert bool(decision.finite) == (step != 1)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(trained(model), 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        weights.append(model.query.weight.detach().clone())
        scales.append(scaler.get_scale())
    moved = [not torch.equal(a, b) for a, b in pairwise(weights)]
    assert moved == [True, False, True, True]
    assert scales == [8.0, 4.0, 4.0, 8.0]


def test_scaled_steps_are_the_plain_ones(expected: list[Tensor]) -> None:
    model = Encoder()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    gate = GradientGate(trained(model), weight=0.3, max_angle=180)
    gate.backward(*(scaler.scale(loss) for loss in losses(model)))
    scaler.unscale_(optimizer)
    torch.testing.assert_close(gradients_of(model), expected)


def test_a_nan_is_written_where_the_first_gradient_is_empty_or_a_number() -> None:
    empty, number = nn.Parameter(torch.zeros(0)), nn.Parameter(torch.tensor(2.0))
    gate = GradientGate([empty, number])
    gate.backward(number.square() + empty.sum(), torch.inf * number)
    assert number.grad.isnan()


def test_adapters_alone() -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["query", "value"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(Encoder(), settings).double()
    assert all("lora" in name for name, p in model.named_parameters() if p.requires_grad)
    main, auxiliary = (
        torch.autograd.grad(loss, trained(model), retain_graph=True, allow_unused=True)
        for loss in losses(model)
    )
    gated(model)
    found = gradients_of(model)
    assert len(found) == 4
    for gradient, left, right in zip(found, main, auxiliary, strict=True):
        torch.testing.assert_close(gradient, 0.7 * left + 0.3 * right)
