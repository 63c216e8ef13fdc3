"""The gate against two backward passes written by hand, in float64."""

import math
from collections.abc import Callable

import pytest
import torch
from fusedacl.engine import GradientGate
from fusedacl.kernels import acl_loss
from torch import Tensor, nn


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


def by_hand(model: nn.Module, main: Tensor, auxiliary: Tensor, weight: float, max_angle: float):
    """Flat (1 - w) g_main + w g_auxiliary with w decided on the angle, and the angle."""
    flat = []
    for loss in (main, auxiliary):
        gradients = torch.autograd.grad(
            loss, list(model.parameters()), retain_graph=True, allow_unused=True
        )
        flat.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for p, g in zip(model.parameters(), gradients, strict=True)
                ]
            )
        )
    cosine = flat[0].dot(flat[1]) / (flat[0].norm() * flat[1].norm())
    angle = math.degrees(math.acos(cosine.clamp(-1, 1)))
    used = weight if angle <= max_angle else 0.0
    return (1 - used) * flat[0] + used * flat[1], angle


def flat_gradient(model: nn.Module) -> Tensor:
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()]
    )


@pytest.fixture
def model() -> TwoHeads:
    return TwoHeads()


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(6, 5, dtype=torch.float64)


@pytest.mark.parametrize(("sign", "kept"), [(1.0, True), (-1.0, False)])
def test_decision_and_gradient_equal_two_backwards_by_hand(
    model: TwoHeads, inputs: Tensor, sign: float, kept: bool
) -> None:
    expected, angle = by_hand(model, *model.losses(inputs, sign), weight=0.2, max_angle=90)
    gate = GradientGate(model.parameters(), weight=0.2)
    decision = gate.backward(*model.losses(inputs, sign))
    assert bool(decision.kept[0]) is kept
    assert decision.weight.tolist() == pytest.approx([0.2 if kept else 0.0])
    assert decision.angle.item() == pytest.approx(angle, abs=1e-4)
    torch.testing.assert_close(flat_gradient(model), expected, rtol=1e-6, atol=1e-9)
    assert decision.grad_norm.item() == pytest.approx(expected.norm().item(), rel=1e-5)


def test_a_dropped_term_leaves_exactly_the_main_gradient(model: TwoHeads, inputs: Tensor) -> None:
    main, auxiliary = model.losses(inputs, sign=-1.0)
    expected = torch.autograd.grad(main, list(model.body.parameters()), retain_graph=True)
    GradientGate(model.parameters(), weight=0.5).backward(main, auxiliary)
    for parameter, gradient in zip(model.body.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("max_angle", [0.0, 45.0, 180.0])
def test_other_thresholds(model: TwoHeads, inputs: Tensor, max_angle: float) -> None:
    expected, _ = by_hand(model, *model.losses(inputs), weight=0.3, max_angle=max_angle)
    gate = GradientGate(model.parameters(), weight=0.3, max_angle=max_angle)
    gate.backward(*model.losses(inputs))
    torch.testing.assert_close(flat_gradient(model), expected, rtol=1e-6, atol=1e-9)


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
        with torch.no_grad():
            position = 0
            for parameter in theirs.parameters():
                part = gradient[position : position + parameter.numel()]
                parameter -= 0.5 * part.view_as(parameter)
                position += parameter.numel()
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


@pytest.mark.parametrize("which", ["main", "auxiliary"])
def test_non_finite_gradients_give_no_decision(model: TwoHeads, inputs: Tensor, which: str) -> None:
    losses = dict(zip(("main", "auxiliary"), model.losses(inputs), strict=True))
    losses[which] = losses[which] * float("inf")
    decision = GradientGate(model.parameters()).backward(losses["main"], losses["auxiliary"])
    assert not bool(decision.finite)
    assert decision.weight.isnan().all()


def test_state_does_not_leak_into_the_next_step(model: TwoHeads, inputs: Tensor) -> None:
    gate = GradientGate(model.parameters(), weight=0.2)
    gate.backward(*model.losses(inputs))
    first = flat_gradient(model)
    model.zero_grad(set_to_none=True)
    gate.backward(*model.losses(inputs))
    assert torch.equal(flat_gradient(model), first)


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


@pytest.mark.parametrize("max_angle", [0.0, 180.0])
def test_a_scope_decides_and_the_gradient_is_that_of_the_decision(
    model: TwoHeads, inputs: Tensor, max_angle: float
) -> None:
    expected, _ = by_hand(model, *model.losses(inputs), weight=0.3, max_angle=max_angle)
    gate = GradientGate(model.parameters(), weight=0.3, max_angle=max_angle)
    decision = gate.backward(*model.losses(inputs), scope=list(model.main_head.parameters()))
    assert decision.kept.tolist() == [max_angle == 180]
    torch.testing.assert_close(flat_gradient(model), expected, rtol=1e-6, atol=1e-9)
    assert decision.grad_norm.item() == pytest.approx(expected.norm().item(), rel=1e-5)


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


def test_an_overflow_in_a_scope_gives_no_decision(model: TwoHeads, inputs: Tensor) -> None:
    main, auxiliary = model.losses(inputs)
    scope = list(model.body.parameters())
    decision = GradientGate(model.parameters()).backward(
        main, auxiliary * float("inf"), scope=scope
    )
    assert not bool(decision.finite)
    assert decision.weight.isnan().all()
