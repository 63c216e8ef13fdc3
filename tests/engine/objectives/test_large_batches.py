"""Large contrastive batches: the gradients of one batch, from chunks, with the same dropout."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fusedacl.engine import TrainingConfig, train
from fusedacl.engine.config.sections import ObjectiveOptions
from fusedacl.engine.model.multi_exit import MultiExitOutput
from fusedacl.engine.objectives.large_batches import Chunk, cached_losses
from fusedacl.engine.objectives.losses import ExitLosses, Teacher, exit_losses
from fusedacl.engine.training.builder import build_run
from fusedacl.engine.training.trainer import Trainer
from torch import Tensor, nn
from torch.nn import functional

CPU = torch.device("cpu")
SIZES = [4, 4, 3]


class Toy(nn.Module):
    """Two exits [E, N, d] with dropout, their classifiers [E, K, d], and a count of open graphs."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 5, dtype=dtype) for _ in range(2))
        self.classifiers = nn.Parameter(torch.randn(2, 3, 5, dtype=dtype))
        self.rows_with_graph = 0

    def forward(self, samples: Tensor) -> MultiExitOutput:
        if torch.is_grad_enabled():
            self.rows_with_graph = max(self.rows_with_graph, len(samples))
        rows = torch.stack([functional.dropout(layer(samples), 0.3) for layer in self.layers])
        logits = torch.einsum("end,ekd->enk", rows, self.classifiers)
        return MultiExitOutput(logits=logits[-1], exit_logits=logits, exit_embeddings=rows)


def chunk_losses(
    model: Toy,
    forwards: Sequence[Callable[[], Chunk]],
    options: ObjectiveOptions,
    shares: list[float],
    weight: float,
    loss_scale: float,
) -> Iterator[ExitLosses]:
    settings: dict[str, Any] = {"weight": weight, "loss_scale": loss_scale, "device": CPU}
    return cached_losses(forwards, lambda: model.classifiers, options, shares=shares, **settings)


def gradients(model: Toy, losses: list[ExitLosses], which: str) -> list[Tensor]:
    model.zero_grad()
    for of_chunk in losses:
        value = of_chunk.main if which == "main" else of_chunk.auxiliary
        assert value is not None
        value.sum().backward(retain_graph=True)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("objective", ["scl", "acl", "acl_cl"])
def test_gradients_are_those_of_one_batch(
    objective: str, several: bool, reduction: str, loss_scale: float
) -> None:
    model, number = Toy(torch.float64), sum(SIZES)
    options = ObjectiveOptions(
        objective=objective[:3], contrastive_reduction=reduction,
        cross_layer=objective == "acl_cl", distill_weight=0.25,
    )  # fmt: skip
    samples, labels = torch.randn(number, 6, dtype=torch.float64), torch.randint(0, 3, (number,))
    if several:
        labels = torch.rand(number, 3) < 0.5
    shapes = ((number, 5), (3, 5), (number, 3))
    constants = Teacher(*(torch.randn(*shape, dtype=torch.float64) for shape in shapes))

    def chunk(place: Tensor) -> Chunk:
        teacher = Teacher(
            constants.embeddings[place], constants.label_embeddings, constants.logits[place]
        )
        return Chunk(model(samples[place]), labels[place], teacher)

    forwards = [partial(chunk, place) for place in torch.arange(number).split(SIZES)]
    torch.manual_seed(5)
    outputs = [forward().output for forward in forwards]
    drawn = torch.get_rng_state()
    whole = MultiExitOutput(
        exit_logits=torch.cat([output.exit_logits for output in outputs], dim=1),
        exit_embeddings=torch.cat([output.exit_embeddings for output in outputs], dim=1),
    )
    # These samples are 60 % of an optimizer step's.
    expected = exit_losses(options, whole, model.classifiers, labels, constants).times(0.6, 0.6)
    shares = [0.6 * size / number for size in SIZES]
    for which in ("main", "auxiliary"):
        model.rows_with_graph = 0
        torch.manual_seed(5)
        of_chunks = list(chunk_losses(model, forwards, options, shares, 0.6, loss_scale))
        assert model.rows_with_graph == max(SIZES)
        assert torch.equal(torch.get_rng_state(), drawn)
        values = torch.stack([of_chunk.values() for of_chunk in of_chunks]).sum(0)
        assert torch.allclose(values, expected.values(), rtol=1e-6)
        found = gradients(model, of_chunks, which)
        for ours, theirs in zip(found, gradients(model, [expected], which), strict=True):
            # Cross-entropy is computed in float32.
            tolerance = 1e-6 if which == "main" else 1e-11
            assert torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def test_float16_keeps_small_gradients() -> None:
    """Gradients of 1e-7 are coarse in float16; those of scaled losses are not."""
    options = ObjectiveOptions(objective="scl", contrastive_reduction="mean", impl="reference")
    samples = torch.randn(8, 6)
    labels = torch.arange(8) % 2

    def gradient(dtype: torch.dtype, loss_scale: float) -> Tensor:
        torch.manual_seed(0)
        model = Toy(torch.float32).to(dtype)

        def chunk(half: int) -> Chunk:
            output = model(samples[4 * half : 4 * half + 4].to(dtype))
            # The gradient of a long row is small.
            output.exit_embeddings = 8000 * output.exit_embeddings
            return Chunk(output, labels[4 * half : 4 * half + 4], None)

        torch.manual_seed(5)
        forwards = [partial(chunk, 0), partial(chunk, 1)]
        losses = chunk_losses(model, forwards, options, [0.5, 0.5], 1.0, loss_scale)
        for of_chunk in losses:
            assert of_chunk.auxiliary is not None
            (2.0**10 * of_chunk.auxiliary.sum()).backward()
        return torch.cat([layer.weight.grad.float().flatten() for layer in model.layers])

    exact = gradient(torch.float32, 1.0)
    unscaled, scaled = (gradient(torch.float16, scale) - exact for scale in (1.0, 2.0**10))
    assert scaled.norm() < 0.01 * exact.norm()
    assert unscaled.norm() > 2 * scaled.norm()


@pytest.fixture
def options(tiny_options: dict[str, Any]) -> dict[str, Any]:
    del tiny_options["output_dir"]
    return {
        **tiny_options, "learning_rate": 1e-3, "dropout": 0.0, "save_steps": 0,
        "contrastive_reduction": "sum", "aux_weight": 0.3, "num_train_epochs": 2,
        "logging_steps": 1,
    }  # fmt: skip


@pytest.mark.parametrize("strategy", ["single", "two_stage"])
def test_steps_equal_those_with_large_batches(options, strategy: str, tmp_path: Path) -> None:
    """In float64, 8 chunks of 4 and, in a last and smaller batch, 20 of 52 texts; gate and all."""
    chunks = {"gradient_accumulation_steps": 8, "contrastive_batch_size": 32}
    trainers = []
    for size, changes in ((32, {}), (4, chunks)):
        settings = {**options, **changes, "per_device_train_batch_size": size, "max_angle": 180}
        settings |= {"strategy": strategy, "max_train_samples": 52}
        config = TrainingConfig.create(**settings, output_dir=str(tmp_path / str(size)))
        trainer = Trainer(build_run(config))
        trainer.model.double()
        trainers.append(trainer)
    large, chunked = trainers
    assert large.plan.ends == chunked.plan.ends
    assert len(large.plan.ends) == (2 if strategy == "two_stage" else 1)
    chunked.model.load_state_dict(large.model.state_dict())
    for index in range(len(large.plan.stages)):
        for trainer in trainers:
            trainer._start_stage(index)
        windows = [[w for _, w in islice(trainer._windows(), 2)] for trainer in trainers]
        for whole, chunks in zip(*windows, strict=True):
            assert (whole[0] == np.concatenate(chunks)).all()
            found = gradients_and_angles(chunked, chunks)
            for ours, theirs in zip(found, gradients_and_angles(large, whole), strict=True):
                # Cross-entropy is computed in float32.
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
            # It moves what it should: all but what no loss reaches.
            assert sum(float(gradient.abs().max()) > 1e-4 for gradient in found[1:]) > 5
            large.step, chunked.step = large.step + 1, chunked.step + 1


def gradients_and_angles(trainer: Trainer, window: list[np.ndarray]) -> list[Tensor]:
    """The angles of a step [G], and the combined gradients of all trained parameters."""
    for losses in trainer.losses.of(1, 1, window):
        trainer.backend.backward(losses)
    decision = trainer.backend.gate.combine()
    gradients = [p.grad for p in trainer.backend.parameters if p.grad is not None]
    trainer.model.zero_grad(set_to_none=True)
    return [decision.angle, *gradients]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_in_mixed_precision(options, precision: str, tmp_path: Path) -> None:
    changes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, precision: True}
    config = TrainingConfig.create(
        **options, **changes, contrastive_batch_size=16, max_steps=2, output_dir=str(tmp_path)
    )
    loss = train(config)["metrics"]["validation"][2]["loss"]
    assert 0 < loss < 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contrastive_batch_size": 48}, "multiple of per_device_train_batch_size=32"),
        ({"contrastive_batch_size": 64}, "Use .*with gradient_accumulation_steps=2 "),
        ({"contrastive_batch_size": 32, "objective": "ce"}, "objective=ce contrasts nothing"),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str) -> None:
    config = TrainingConfig.create(task_name="quickstart", output_dir="x", **changes)
    with pytest.raises(ValueError, match=message):
        config.resolved()
