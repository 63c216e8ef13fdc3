"""The gate against two backward passes written by hand, in float64."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from fusedacl.engine import GradientGate
from fusedacl.kernels import acl_loss
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.testing._internal.two_tensor import TwoTensor


class TwoHeads(nn.Module):
    """A body that both losses reach, a head for each, and a parameter that none reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 7)
        self.main_head = nn.Linear(7, 3)
        self.auxiliary_head = nn.Linear(7, 2)
        self.unused = nn.Parameter(torch.ones(4))
        self.double()

    def losses(self, inputs: Tensor, sign: float = 1.0) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.body(inputs))
        main = self.main_head(hidden).square().mean()
        return main, sign * main + 0.3 * self.auxiliary_head(hidden).square().mean()


def flat(model: nn.Module, gradients: Iterable[Tensor | None]) -> Tensor:
    """Gradients of all parameters as one vector, zeros where there is none."""
    pairs = zip(model.parameters(), gradients, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])


def by_hand(model: nn.Module, main: Tensor, auxiliary: Tensor, weight: float, max_angle: float):
    """Flat (1 - w) g_main + w g_auxiliary with w decided on the angle, and the angle."""
    settings: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    parameters = list(model.parameters())
    first, second = (
        flat(model, torch.autograd.grad(loss, parameters, **settings)) for loss in (main, auxiliary)
    )
    cosine = first.dot(second) / (first.norm() * second.norm())
    angle = math.degrees(math.acos(cosine.clamp(-1, 1)))
    used = weight if angle <= max_angle else 0.0
    return (1 - used) * first + used * second, angle


def flat_gradient(model: nn.Module) -> Tensor:
    return flat(model, (parameter.grad for parameter in model.parameters()))


@pytest.fixture
def model() -> TwoHeads:
    return TwoHeads()


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(6, 5, dtype=torch.float64)


def test_a_dropped_term_leaves_exactly_the_main_gradient(model: TwoHeads, inputs: Tensor) -> None:
    main, auxiliary = model.losses(inputs, sign=-1.0)
    expected = torch.autograd.grad(main, list(model.body.parameters()), retain_graph=True)
    GradientGate(model.parameters(), weight=0.5).backward(main, auxiliary)
    for parameter, gradient in zip(model.body.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("scoped", [False, True])
@pytest.mark.parametrize(
    ("sign", "max_angle"), [(1.0, 0.0), (1.0, 45.0), (1.0, 180.0), (1.0, 90.0), (-1.0, 90.0)]
)
def test_decision_and_gradient_equal_two_backwards_by_hand(
    model: TwoHeads, inputs: Tensor, sign: float, max_angle: float, scoped: bool
) -> None:
    limit = max_angle
    if scoped:
        # Over the main head alone, both losses' gradients are parallel but for rounding.
        limit = 180.0 if sign > 0 and max_angle > 0 else 0.0
    expected, angle = by_hand(model, *model.losses(inputs, sign), weight=0.3, max_angle=limit)
    gate = GradientGate(model.parameters(), weight=0.3, max_angle=max_angle)
    scope = list(model.main_head.parameters()) if scoped else None
    decision = gate.backward(*model.losses(inputs, sign), scope=scope)
    assert bool(decision.kept[0]) is (angle <= limit)
    assert decision.weight.tolist() == pytest.approx([0.3 if angle <= limit else 0.0])
    assert scoped or decision.angle.item() == pytest.approx(angle, abs=1e-4)
    torch.testing.assert_close(flat_gradient(model), expected, rtol=1e-6, atol=1e-9)
    assert decision.grad_norm.item() == pytest.approx(expected.norm().item(), rel=1e-5)


def test_update_of_a_small_classifier_equals_the_loop_by_hand() -> None:
    """Ten SGD steps of CE and ACL-Embed: same decisions, same weights, both decisions taken."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(10, 12, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (10, 12), generator=generator)

    def build() -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3, bias=False)).double()

    def losses(model: nn.Sequential, step: int) -> tuple[Tensor, Tensor]:
        hidden = model[:2](inputs[step])
        main = nn.functional.cross_entropy(model[2](hidden), labels[step])
        auxiliary = acl_loss(hidden, labels[step], model[2].weight, reduction="sum")
        return main, auxiliary

    ours, theirs = build(), build()
    gate = GradientGate(ours.parameters(), weight=0.1, max_angle=70)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.5)
    decisions, decisions_by_hand = [], []
    for step in range(10):
        optimizer.zero_grad()
        decisions.append(bool(gate.backward(*losses(ours, step)).kept[0]))
        optimizer.step()
        gradient, angle = by_hand(theirs, *losses(theirs, step), weight=0.1, max_angle=70)
        decisions_by_hand.append(angle <= 70)
        moved = parameters_to_vector(theirs.parameters()) - 0.5 * gradient
        vector_to_parameters(moved.detach(), theirs.parameters())
    assert decisions == decisions_by_hand
    assert set(decisions) == {True, False}
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-8)


def test_micro_batches_add_up_to_the_batch(model: TwoHeads, inputs: Tensor) -> None:
    gate = GradientGate(model.parameters(), weight=0.2)
    whole = gate.backward(*model.losses(inputs))
    expected = flat_gradient(model)
    model.zero_grad(set_to_none=True)
    for part in (inputs[:2], inputs[2:4], inputs[4:]):
        main, auxiliary = model.losses(part)
        gate.accumulate(main / 3, auxiliary / 3)
    decision = gate.combine()
    torch.testing.assert_close(flat_gradient(model), expected)
    torch.testing.assert_close(decision.angle, whole.angle)


@pytest.mark.parametrize("num_parts", [1, 2, 3])
def test_gradients_that_autograd_shares_between_parameters(num_parts: int) -> None:
    """The gradient of a sum is one tensor for both terms, and that of x.sum() one element."""
    left, right = (nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2))
    factor = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    gate = GradientGate([left, right], weight=1.0, max_angle=180)
    for _ in range(num_parts):
        auxiliary = ((left + right) * factor).sum() + left.sum()
        gate.accumulate(left.square().sum() + right.square().sum(), auxiliary)
    gate.combine()
    torch.testing.assert_close(left.grad, num_parts * (factor + 1))
    torch.testing.assert_close(right.grad, num_parts * factor)


def test_loss_scale_and_clipping(model: TwoHeads, inputs: Tensor) -> None:
    expected, angle = by_hand(model, *model.losses(inputs), weight=0.2, max_angle=90)
    gate = GradientGate(model.parameters(), weight=0.2)
    main, auxiliary = model.losses(inputs)
    gate.accumulate(1024 * main, 1024 * auxiliary)
    decision = gate.combine(loss_scale=1024, max_norm=0.1)
    assert decision.grad_norm.item() == pytest.approx(expected.norm().item(), rel=1e-5)
    assert decision.angle.item() == pytest.approx(angle, abs=1e-4)
    clipped = expected * 0.1 / (expected.norm() + 1e-6)
    torch.testing.assert_close(flat_gradient(model), clipped, rtol=1e-5, atol=1e-9)


def test_groups_decide_for_themselves() -> None:
    left, right = nn.Linear(3, 1).double(), nn.Linear(3, 1).double()
    inputs = torch.randn(4, 3, dtype=torch.float64)
    main = left(inputs).square().mean() + right(inputs).square().mean()
    auxiliary = left(inputs).square().mean() - right(inputs).square().mean()
    parameters = [*left.parameters(), *right.parameters()]
    gate = GradientGate(parameters, weight=0.5, groups=[0, 0, 1, 1])
    decision = gate.backward(main, auxiliary)
    assert decision.angle.tolist() == pytest.approx([0.0, 180.0], abs=1e-3)
    assert decision.kept.tolist() == [True, False]


def test_zero_auxiliary_gradient_is_kept(model: TwoHeads, inputs: Tensor) -> None:
    main, _ = model.losses(inputs)
    decision = GradientGate(model.parameters(), weight=0.5).backward(main, torch.zeros(()))
    assert decision.angle.item() == 90
    assert bool(decision.kept[0])


@pytest.mark.parametrize("scoped", [False, True])
@pytest.mark.parametrize("which", [0, 1])
def test_non_finite_gradients_give_no_decision(
    model: TwoHeads, inputs: Tensor, which: int, scoped: bool
) -> None:
    losses = list(model.losses(inputs))
    losses[which] = losses[which] * float("inf")
    scope = list(model.body.parameters()) if scoped else None
    decision = GradientGate(model.parameters()).backward(*losses, scope=scope)
    assert not bool(decision.finite)
    assert decision.weight.isnan().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: GradientGate(p, weight=1.5), r"weight=1.5 must lie in \[0, 1\]"),
        (lambda p: GradientGate(p, max_angle=200), r"max_angle=200 degrees must lie in \[0, 180\]"),
        (lambda p: GradientGate([]), "parameters must be trained parameters"),
        (lambda p: GradientGate([nn.Parameter(torch.ones(1), False)]), "requires_grad=True"),
        (lambda p: GradientGate(p, impl="triton"), "impl='triton' cannot run"),
        (lambda p: GradientGate(p, impl="tield"), "did you mean 'tiled'"),
        (lambda p: GradientGate(p, groups=[0]), "groups has 1 entries for 7 parameters"),
    ],
)
def test_bad_arguments(
    model: TwoHeads,
    make: Callable[[list[nn.Parameter]], GradientGate],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=message):
        make(list(model.parameters()))


def test_the_angle_of_a_scope_is_between_its_own_gradients(model: TwoHeads, inputs: Tensor) -> None:
    """The representations of a batch: tensors that are no parameters."""
    hidden = torch.tanh(model.body(inputs))
    main = model.main_head(hidden).square().mean()
    auxiliary = model.auxiliary_head(hidden).square().mean()
    both = [torch.autograd.grad(loss, hidden, retain_graph=True)[0] for loss in (main, auxiliary)]
    cosine = (both[0] * both[1]).sum() / (both[0].norm() * both[1].norm())
    angle = math.degrees(math.acos(cosine))
    decision = GradientGate(model.parameters()).backward(main, auxiliary, scope=[hidden])
    assert decision.angle.item() == pytest.approx(angle, abs=1e-3)
    assert decision.active.tolist() == [True]


def test_a_scope_beside_groups_is_refused(model: TwoHeads, inputs: Tensor) -> None:
    gate = GradientGate(model.body.parameters(), groups=[0, 1])
    with pytest.raises(ValueError, match="scope: the gate has groups"):
        gate.backward(*model.losses(inputs), scope=list(model.body.parameters()))


def tied_losses(model: nn.ModuleDict, inputs: Tensor) -> tuple[Tensor, Tensor]:
    hidden = model["encoder"](model["words"].weight[:6] * inputs)
    guesses = model["guess"](hidden)
    return guesses.square().mean(), hidden.sin().mean()


@pytest.mark.parametrize("groups", [None, [0, 1, 1, 0]])
def test_a_tied_weight_that_is_listed_twice_counts_once(groups: list[int] | None) -> None:
    made = []
    inputs = torch.randn(6, 8)
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.ModuleDict(
            {"words": nn.Embedding(12, 8), "encoder": nn.Linear(8, 8), "guess": nn.Linear(8, 12)}
        )
        model["guess"].weight, model["guess"].bias = model["words"].weight, None
        made.append(model)
    once, twice = made
    listed = [p for name in ("words", "encoder", "guess") for p in twice[name].parameters()]
    assert len(listed) == len(list(once.parameters())) + 1
    short = None if groups is None else groups[:3]
    one = GradientGate(once.parameters(), weight=0.3, groups=short)
    two = GradientGate(listed, weight=0.3, groups=groups)
    first = one.backward(*tied_losses(once, inputs))
    assert torch.equal(first.angle, two.backward(*tied_losses(twice, inputs)).angle)
    for left, right in zip(once.parameters(), twice.parameters(), strict=True):
        assert torch.equal(left.grad, right.grad)
    with pytest.raises(ValueError, match="parameters: entry 1 .* is in the groups 0 and 1"):
        GradientGate([listed[0], listed[0]], groups=[0, 1])


def test_parameters_that_are_frozen_or_unfrozen_later_are_refused() -> None:
    encoder, head = nn.Linear(4, 4), nn.Linear(4, 2)
    encoder.bias.requires_grad_(False)

    def losses() -> tuple[Tensor, Tensor]:
        hidden = encoder(torch.ones(3, 4))
        return head(hidden).square().mean(), hidden.sin().mean()

    trained = [p for p in (*encoder.parameters(), *head.parameters()) if p.requires_grad]
    GradientGate(trained).backward(*losses())
    encoder.bias.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"trains a parameter of shape \(4,\) that the gate does not"
    ):
        GradientGate(trained).backward(*losses())
    encoder.bias.requires_grad_(False)
    gate = GradientGate(trained)
    head.weight.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"parameter of shape \(2, 4\) was frozen later: make a new"
    ):
        gate.backward(*losses())


def test_other_tensors_than_plain_ones_are_refused() -> None:
    sharded = nn.Parameter(TwoTensor(torch.ones(2), torch.ones(2)))
    with pytest.raises(
        ValueError, match="parameters: one is a TwoTensor. The gate takes plain parameters"
    ):
        GradientGate([sharded])
