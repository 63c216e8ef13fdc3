"""The gate with a cut, beside both losses' whole gradients and beside the exact gate."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from fusedacl.engine import GradientGate, MultiExitConfig, MultiExitForSequenceClassification
from fusedacl.engine.config.sections import ObjectiveOptions
from fusedacl.engine.objectives.gate_cut import Cut, ScopedGate, map_gradient, top_parameters
from fusedacl.engine.objectives.losses import ExitLosses, exit_losses
from fusedacl.kernels import grad_dot_norm
from fusedacl.kernels.gradients.angle import angle_degrees
from torch import Tensor, nn
from transformers import AlbertConfig, BertConfig, ModernBertConfig, MPNetConfig

NUM_LAYERS = 3
SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
Batch = tuple[Tensor, Tensor]
SCOPES = ["top:1", "top:2", "top:3", "head"]


def new_model(exit_head: str = "mha", encoder: Any = None) -> MultiExitForSequenceClassification:
    torch.manual_seed(0)
    head, _, pooling = exit_head.partition(" ")
    config = MultiExitConfig(
        BertConfig(**SIZES, **QUIET) if encoder is None else encoder,
        exit_head=head,
        exit_pooling=pooling or "first",
        exit_dropout=0.0,
        num_labels=3,
    )
    return MultiExitForSequenceClassification(config).train()


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(5, 60, (12, 9), generator=generator)
    return ids, torch.randint(3, (12,), generator=generator)


def losses_of(model: MultiExitForSequenceClassification, batch: Batch) -> Any:
    ids, labels = batch
    output = model(input_ids=ids)
    return exit_losses(ObjectiveOptions(), output, model.label_embeddings, labels)


def sums(losses: ExitLosses) -> tuple[Tensor, Tensor]:
    assert losses.auxiliary is not None
    return losses.main.sum(), losses.auxiliary.sum()


def scoped_gate(
    model: MultiExitForSequenceClassification, batch: Batch, scope: str, **settings: Any
) -> ScopedGate:
    """A gate over all parameters that has accumulated a batch."""
    gate = ScopedGate(model, model.parameters(), scope, **settings)
    gate.accumulate(*sums(losses_of(model, batch)))
    return gate


def gradients_of(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def angle_between(losses: ExitLosses, tensors: Sequence[Tensor]) -> float:
    """The angle in degrees between the gradients of both losses, by whole backward passes."""
    both = [
        torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
        for loss in sums(losses)
    ]
    return angle_degrees(grad_dot_norm(*both, impl="reference")).item()


ENCODERS: dict[str, tuple[str, Any]] = {
    "mha": ("mha", None),
    "linear": ("linear", None),
    "linear mean": ("linear mean", None),
    # Its last layer is followed by a norm.
    "modernbert": (
        "mha",
        ModernBertConfig(
            **SIZES, pad_token_id=0, embedding_dropout=0.0, global_attn_every_n_layers=2
        ),
    ),
    # Its layers share a bias that is learned.
    "mpnet": ("mha", MPNetConfig(**SIZES, **QUIET)),
}


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kept", [True, False])
def test_given_the_decision_the_gradient_is_the_exact_gates(
    batch: Batch, name: str, scope: str, kept: bool
) -> None:
    """What lies beside the layers counts once."""
    settings = {"weight": 0.3, "max_angle": 180.0 if kept else 0.0}
    exact, scoped = new_model(*ENCODERS[name]), new_model(*ENCODERS[name])
    wanted = GradientGate(exact.parameters(), **settings)
    wanted.accumulate(*sums(losses_of(exact, batch)))
    expected = wanted.combine(loss_scale=4.0, max_norm=0.05)
    gate = scoped_gate(scoped, batch, scope, **settings)
    decision = gate.combine(loss_scale=4.0, max_norm=0.05)
    assert decision.kept.tolist() == expected.kept.tolist() == [kept]
    assert decision.weight.tolist() == expected.weight.tolist()
    assert decision.grad_norm.item() == pytest.approx(expected.grad_norm.item(), rel=1e-5)
    # It was clipped.
    assert decision.grad_norm.item() > 0.05
    torch.testing.assert_close(gradients_of(scoped), gradients_of(exact), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("exit_head", ["mha", "linear", "linear mean"])
@pytest.mark.parametrize("scope", SCOPES)
def test_the_angle_is_that_of_the_scope(batch: Batch, exit_head: str, scope: str) -> None:
    model = new_model(exit_head)
    layers = model.backbone.encoder.layer
    losses = losses_of(model, batch)
    tensors = [
        p for module in (*layers[-NUM_TOP[scope] :], model.exits[-1]) for p in module.parameters()
    ]
    expected = angle_between(losses, tensors) if scope != "head" else head_angle(model, batch)
    for max_angle, kept in ((expected + 0.1, True), (expected - 0.1, False)):
        gate = scoped_gate(model, batch, scope, max_angle=max_angle)
        decision = gate.combine()
        gate.close()
        assert decision.angle.item() == pytest.approx(expected, abs=1e-3)
        assert decision.kept.tolist() == [kept]
        model.zero_grad()
    # Another scope would decide otherwise.
    assert abs(angle_between(losses, list(model.parameters())) - expected) > 0.1 or scope == "top:3"


NUM_TOP = {"top:1": 1, "top:2": 2, "top:3": 3, "head": 0}


def head_angle(model: MultiExitForSequenceClassification, batch: Batch) -> float:
    """Between the gradients of a map of zeros, from what the exit reads, that adds to that."""
    ids, labels = batch
    exit_: Any = model.exits[-1]
    made = torch.zeros(
        exit_.classifier.in_features, SIZES["hidden_size"], requires_grad=True, dtype=torch.float64
    )
    model.double()
    state = model.exit_states(ids)[0]
    embeddings = exit_(state, torch.ones_like(ids)).embeddings
    read = state.mean(dim=1) if model.config.exit_pooling == "mean" else state[:, 0]
    embeddings = embeddings.detach() + read.detach() @ made.T
    output = type(model(ids))(
        exit_logits=exit_.classifier(embeddings)[None], exit_embeddings=embeddings[None]
    )
    losses = exit_losses(ObjectiveOptions(), output, model.label_embeddings, labels)
    angle = angle_between(losses, [made])
    model.float()
    return angle


def test_a_map_of_half_precision_is_summed_in_single() -> None:
    gradient = torch.full((3, 2), 40000.0, dtype=torch.float16)
    states = torch.ones(3, 4, dtype=torch.float16)
    torch.testing.assert_close(map_gradient(gradient, states), torch.full((2, 4), 120000.0))


@pytest.mark.parametrize(("scope", "passes"), [("top:1", [1, 1, 2]), ("head", [1, 1, 1])])
def test_one_backward_pass_below_the_cut(batch: Batch, scope: str, passes: list[int]) -> None:
    model = new_model()
    counts = [0] * NUM_LAYERS

    def count(number: int, module: nn.Module, args: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        tensor.register_hook(lambda gradient: counts.__setitem__(number, counts[number] + 1))

    for number, layer in enumerate(model.backbone.encoder.layer):
        layer.register_forward_hook(partial(count, number))
    scoped_gate(model, batch, scope).combine()
    assert counts == passes


@pytest.mark.parametrize("scope", ["top:1", "head"])
def test_comparing_finds_the_exact_angle_and_changes_nothing(batch: Batch, scope: str) -> None:
    results = []
    for compare in (False, True):
        model = new_model()
        gate = scoped_gate(model, batch, scope, weight=0.3, max_angle=180)
        results.append((gate.combine(compare=compare), gradients_of(model)))
    (without, plain), (decision, compared) = results
    assert without.exact_angle is None and without.agrees is None
    assert all(torch.equal(a, b) for a, b in zip(plain, compared, strict=True))
    model = new_model()
    exact = angle_between(losses_of(model, batch), list(model.parameters()))
    assert decision.exact_angle is not None
    assert decision.exact_angle.item() == pytest.approx(exact, abs=1e-3)
    assert abs(decision.angle.item() - exact) > 0.5
    # Between the two angles they disagree.
    between = (decision.angle.item() + exact) / 2
    for max_angle, agrees in ((180.0, True), (between, False), (0.0, True)):
        gate = scoped_gate(new_model(), batch, scope, max_angle=max_angle)
        found = gate.combine(compare=True).agrees
        assert found is not None and found.tolist() == [agrees]


@pytest.mark.parametrize("which", [0, 1])
def test_an_overflow_above_the_cut_gives_no_decision(batch: Batch, which: int) -> None:
    model = new_model()
    gate = ScopedGate(model, model.parameters(), "head", weight=0.3, max_angle=180)
    losses = list(sums(losses_of(model, batch)))
    losses[which] *= float("inf")
    gate.accumulate(*losses)
    decision = gate.combine()
    assert not decision.finite
    assert decision.weight.isnan().all()


def test_a_closed_gate_leaves_the_model_whole(batch: Batch) -> None:
    model, plain = new_model(), new_model()
    for scope in ("top:2", "head"):
        gate = ScopedGate(model, model.parameters(), scope)
        with torch.no_grad():
            expected = model(input_ids=batch[0]).logits
        main, _ = sums(losses_of(model, batch))
        main.backward()
        # Cut: nothing arrives below.
        assert model.backbone.embeddings.word_embeddings.weight.grad is None
        model.zero_grad()
        gate.close()
        assert torch.equal(plain(input_ids=batch[0]).logits, expected)
    for which in (model, plain):
        sums(losses_of(which, batch))[0].backward()
    assert all(map(torch.equal, gradients_of(model), gradients_of(plain)))


def test_one_batch_a_step(batch: Batch) -> None:
    model = new_model()
    gate = scoped_gate(model, batch, "head")
    with pytest.raises(RuntimeError, match="one batch a step"):
        gate.accumulate(*sums(losses_of(model, batch)))


@pytest.mark.parametrize(
    ("encoder", "scope", "message"),
    [
        (None, "top:4", "gate_scope=top:4: the encoder has 3 layers. Use top:3 at most, or all."),
        (AlbertConfig(**SIZES, embedding_size=16), "top:1", "no list of 3 layers .* AlbertModel"),
        (None, "top:0", "is not one of all, head"),
        (None, "all", "has no cut"),
    ],
)
def test_refused(encoder: Any, scope: str, message: str) -> None:
    model = new_model(encoder=encoder)
    with pytest.raises(ValueError, match=message):
        ScopedGate(model, model.parameters(), scope)


def test_a_layer_that_is_called_otherwise_is_refused(batch: Batch) -> None:
    model = new_model()
    Cut(model, "top:1")
    with pytest.raises(ValueError, match="BertLayer is not called with hidden states"):
        model.backbone.encoder.layer[-1](states=torch.zeros(1, 2, 32))


def test_frozen_parameters_do_not_decide() -> None:
    model = new_model()
    every = len(top_parameters(model, 1))
    model.exits[-1].requires_grad_(False)
    assert len(top_parameters(model, 1)) == every - len(list(model.exits[-1].parameters()))


def test_nothing_below_the_cut_to_train(batch: Batch) -> None:
    model = new_model()
    model.backbone.requires_grad_(False)
    gate = ScopedGate(model, model.exits.parameters(), "top:1")
    with pytest.raises(RuntimeError, match="no forward pass with a graph below the cut"):
        gate.accumulate(*sums(losses_of(model, batch)))
