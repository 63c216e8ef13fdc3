"""The local backend: accumulation, mixed precision, clipping, schedule, and skipped steps."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fusedacl.engine import TrainingConfig
from fusedacl.engine.backends.local import LocalBackend
from fusedacl.engine.backends.optimizers import decay_groups
from fusedacl.engine.objectives.losses import ExitLosses
from fusedacl.kernels import acl_loss
from torch import Tensor, nn

CPU = torch.device("cpu")
WHOLE = (slice(0, 24),)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 3, bias=False)

    def losses(self, inputs: Tensor, labels: Tensor) -> ExitLosses:
        hidden = torch.tanh(self.norm(self.body(inputs)))
        main = nn.functional.cross_entropy(self.head(hidden).float(), labels)
        return ExitLosses(main[None], acl_loss(hidden, labels, self.head.weight)[None])


def backend_of(model: nn.Module, num_steps: int = 20, **options: Any) -> LocalBackend:
    config = TrainingConfig.create(
        task_name="quickstart", output_dir="unused", learning_rate=0.01, aux_weight=0.2, **options
    )
    groups = {"model": list(model.parameters())}
    return LocalBackend(
        model, config.resolved(), num_steps, CPU, groups=groups, independent=False,
        learning_rate=0.01, gate_scope="all",
    )  # fmt: skip


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(24, 6, generator=generator)
    return inputs, inputs[:, :3].argmax(dim=1)


def train(
    backend: LocalBackend, model: Classifier, data, steps: int, parts: Sequence[slice] = WHOLE
) -> list:
    inputs, labels = data
    reports = []
    for _ in range(steps):
        for part in parts:
            with backend.forward_context():
                losses = model.losses(inputs[part], labels[part])
            share = len(labels[part]) / len(labels)
            backend.backward(losses.times(share, share))
        reports.append(backend.step())
    return reports


def parameters_of(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def build(**options: Any) -> tuple[Classifier, LocalBackend]:
    torch.manual_seed(2)
    model = Classifier()
    return model, backend_of(model, **options)


def test_unequal_micro_batches_equal_one_batch(data) -> None:
    """For cross-entropy; the contrastive term sees the micro-batch as its batch, by design."""
    gradients = []
    for parts in (WHOLE, [slice(0, 10), slice(10, 20), slice(20, 24)]):
        model, backend = build(objective="ce")
        for part in parts:
            losses = ExitLosses(model.losses(data[0][part], data[1][part]).main, None)
            share = len(data[1][part]) / 24
            backend.backward(losses.times(share, share))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [({}, torch.float32), ({"bf16": True}, torch.bfloat16), ({"fp16": True}, torch.float16)],
)
@pytest.mark.parametrize("gate", ["angle", "none"])
def test_learns_in_every_precision(data, options, dtype: torch.dtype, gate: str) -> None:
    model, backend = build(objective="acl", gate=gate, num_steps=60, **options)
    assert backend.dtype == dtype
    assert backend.scaler.enabled is (dtype == torch.float16)
    train(backend, model, data, steps=60)
    assert model.losses(*data).main.item() < 0.3
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("gate", ["angle", "none"])
def test_fp16_overflow_skips_the_step_and_recovers(data, gate: str) -> None:
    model, backend = build(objective="acl", gate=gate, fp16=True)
    backend.scaler.scale.fill_(2.0**40)
    before = parameters_of(model)
    report = train(backend, model, data, steps=1)[0]
    assert report.skipped
    assert torch.equal(parameters_of(model), before)
    assert backend.scaler.scale == 2.0**39
    reports = train(backend, model, data, steps=40)
    assert not reports[-1].skipped
    assert parameters_of(model).isfinite().all()
    assert not torch.equal(parameters_of(model), before)
    # The schedule counts the steps that were taken.
    taken = sum(not report.skipped for report in reports)
    assert backend.optimizer.num_taken == taken


def test_fp16_has_the_angles_of_fp32(data) -> None:
    """Every step starts from equal weights, so that rounding does not add up over the steps."""
    model, backend = build(objective="acl", max_angle=60)
    half_model, half = build(objective="acl", max_angle=60, fp16=True)
    for _ in range(10):
        half_model.load_state_dict(model.state_dict())
        (exact,) = train(backend, model, data, steps=1)
        (rounded,) = train(half, half_model, data, steps=1)
        assert rounded.decision.angle.item() == pytest.approx(exact.decision.angle.item(), abs=1)


def test_non_finite_gradient_without_loss_scaling_is_an_error(data) -> None:
    model, backend = build(objective="acl")
    backend.backward(model.losses(data[0] * float("nan"), data[1]))
    report = backend.step()
    with pytest.raises(FloatingPointError, match="The gradient is NaN or infinite"):
        backend.check(report.loss_scale, bool(report.skipped))


@pytest.mark.parametrize("gate", ["angle", "none"])
def test_clipping(data, gate: str) -> None:
    model, backend = build(objective="acl", gate=gate, max_grad_norm=1e-3)
    norms = []
    backend.optimizer.optimizer.register_step_pre_hook(
        lambda *_: norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm())
    )
    report = train(backend, model, data, steps=1)[0]
    assert report.grad_norm > 1e-2
    assert norms[0].item() == pytest.approx(1e-3, rel=1e-3)


def test_schedule_warms_up_and_decays_to_zero(data) -> None:
    model, backend = build(objective="acl", warmup_ratio=0.25, num_steps=20)
    rates = [r.learning_rate for r in train(backend, model, data, steps=20)]
    assert rates[:6] == pytest.approx([0, 0.002, 0.004, 0.006, 0.008, 0.01])
    assert rates[-1] == pytest.approx(0.01 / 15)
    assert backend.optimizer.learning_rate == 0


def test_biases_and_norms_do_not_decay() -> None:
    model = Classifier()
    decayed, kept = decay_groups(list(model.parameters()), 0.01)
    assert {id(p) for p in decayed["params"]} == {id(model.body.weight), id(model.head.weight)}
    vectors = (model.body.bias, model.norm.weight, model.norm.bias)
    assert {id(p) for p in kept["params"]} == set(map(id, vectors))
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.01, 0.0)


def test_the_state_of_a_run_under_deepspeed_is_refused() -> None:
    with pytest.raises(ValueError, match="under DeepSpeed: resume with a launcher"):
        build(objective="acl")[1].load_state_dict({"layout": {}, "optimizer": {}})
