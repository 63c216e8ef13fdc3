"""Runs with a memory, a learned temperature and class weights in their contrastive batches."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from fusedacl.engine import TrainingConfig
from fusedacl.engine.objectives import losses
from fusedacl.engine.training.builder import build_run
from fusedacl.engine.training.micro_batches import StepLosses
from fusedacl.engine.training.storage.checkpoint import learned_temperature
from fusedacl.engine.training.trainer import Trainer
from fusedacl.kernels import acl_loss, supcon_loss
from tiny_runs import at_step, records, run, weights
from torch import Tensor

LEARNED = {"temperature_learning_rate": 0.05, "temperature": 0.4}


@pytest.fixture
def calls(monkeypatch) -> list[dict[str, Any]]:
    """The arguments and the value of every contrastive loss of the kernels that a run takes."""
    found: list[dict[str, Any]] = []

    def noted(function: Any) -> Any:
        def call(samples: Tensor, **settings: Any) -> Tensor:
            value = function(samples, **settings)
            tensors = [samples, settings["labels"], settings.get("label_embeddings")]
            # Copies, because the classifier's weight moves on.
            inputs = [tensor.detach().clone() for tensor in tensors if tensor is not None]
            found.append({"tensors": inputs, "value": value.detach()})
            found[-1] |= {name: settings.get(name) for name in NOTED}
            return value

        return call

    for name, function in (("supcon_loss", supcon_loss), ("acl_loss", acl_loss)):
        monkeypatch.setattr(losses, name, noted(function))
    return found


NOTED = ("temperature", "memory_embeddings", "memory_labels", "class_weights")


@pytest.mark.parametrize(
    ("objective", "exit_head", "width"), [("scl", "linear", 32), ("acl", "mha", 64)]
)
def test_the_memory_holds_the_last_samples(
    options, calls: list[dict[str, Any]], objective: str, exit_head: str, width: int
) -> None:
    """All micro-batches of the steps enter in their order, each after its loss."""
    size = 40
    steps = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 6}
    run(options, objective=objective, exit_head=exit_head, memory_size=size, **steps)
    assert len(calls) == 12
    kept: deque[tuple[Tensor, int]] = deque(maxlen=size)
    function = {"scl": supcon_loss, "acl": acl_loss}[objective]
    for call in calls:
        assert call["memory_embeddings"].shape == (size, width)
        exists = call["memory_labels"] != -100
        assert call["memory_labels"][exists].tolist() == [label for _, label in kept]
        x, y, *label_embeddings = call["tensors"]
        by_hand: dict[str, Any] = {"temperature": 0.5}
        if kept:
            rows = torch.stack([row for row, _ in kept])
            assert torch.equal(call["memory_embeddings"][exists], rows)
            labels = torch.tensor([label for _, label in kept])
            by_hand |= {"memory_embeddings": rows, "memory_labels": labels}
        expected = function(x[0], y, *(rows[0] for rows in label_embeddings), **by_hand)
        torch.testing.assert_close(call["value"], expected[None])
        kept.extend(zip(x[0], y.tolist(), strict=True))


def test_a_warm_up_fills_the_memory_and_does_not_read_it(options, calls) -> None:
    run(options, memory_size=32, memory_warmup_steps=3, max_steps=5)
    read = [call["memory_labels"] for call in calls]
    assert read[:3] == [None] * 3
    assert [int((labels != -100).sum()) for labels in read[3:]] == [32, 32]
    before = torch.cat([call["tensors"][1] for call in calls[1:3]])
    assert torch.equal(read[3], before)


def test_a_skipped_step_enters_the_memory(options, calls, monkeypatch) -> None:
    """The overflow is of a gradient; the representations of the step are finite."""

    def overflow(trainer: Trainer) -> None:
        trainer.backend.scaler.scale.fill_(2.0**100)

    at_step(monkeypatch, 2, overflow, before=True)
    run(options, fp16=True, memory_size=32, max_steps=3)
    lines = records(options["output_dir"], "train")
    assert [line["skipped"] for line in lines[:2]] == [False, True]
    labels = torch.cat([call["tensors"][1] for call in calls[:2]])
    assert torch.equal(calls[2]["memory_labels"], labels)


def test_the_second_stage_has_no_memory(options, calls) -> None:
    run(options, objective="scl", strategy="two_stage", memory_size=16, max_steps=2)
    assert [call["memory_labels"] is None for call in calls] == [False, False, True, True]


def test_a_warm_up_as_long_as_the_stage_is_refused(options) -> None:
    message = "memory_warmup_steps=12: the memory would never be read, because the stage has 12"
    with pytest.raises(ValueError, match=message):
        run(options, memory_size=16, memory_warmup_steps=12)


def test_a_temperature_is_learned_and_recorded(options) -> None:
    """Without the gate it moves in every step, and what is recorded is what a step used."""
    results = run(options, objective="scl", max_steps=5, **LEARNED)
    values = [line["temperature"] for line in records(options["output_dir"], "train")]
    assert values[0] == pytest.approx(0.4)
    assert len(set(values)) == 5
    assert results["temperature"] not in values
    found = json.loads(Path(options["output_dir"], "results.json").read_text())
    assert found["temperature"] == results["temperature"]
    card = Path(options["output_dir"], "README.md").read_text()
    assert f"tau {results['temperature']:.4g} (learned, from 0.4)" in card


def test_the_best_model_has_its_own_temperature(options) -> None:
    """The one that its checkpoint has, not that of the last step."""
    options |= {"objective": "scl", "eval_steps": 2, "save_steps": 2, "max_steps": 8, **LEARNED}
    options |= {"metric_for_best_model": "loss", "greater_is_better": True, "learning_rate": 5e-4}
    results = run(options, load_best_model_at_end=True)
    step = results["best"]["step"]
    assert step < 8
    used = [line["temperature"] for line in records(options["output_dir"], "train")]
    assert results["temperature"] == pytest.approx(used[step])
    checkpoint = Path(options["output_dir"], f"checkpoint-{step}")
    for directory in (checkpoint, checkpoint.parent):
        assert learned_temperature(directory) == pytest.approx(results["temperature"])


@pytest.mark.parametrize("scope", ["all", "head", "top:1"])
def test_a_temperature_moves_only_where_the_term_is_kept(options, scope: str) -> None:
    """As in a run without the gate while it keeps, and not at all where it drops everything."""
    options |= {"max_steps": 4, "gate": "angle", "gate_scope": scope, **LEARNED}
    moved = {}
    for angle in (0, 180):
        run(options, max_angle=angle, overwrite_output_dir=True)
        lines = records(options["output_dir"], "train")
        moved[angle] = [line["temperature"] for line in lines]
        kept = 0.0 if angle == 0 else 0.02
        assert [line["aux_weight"] for line in lines] == pytest.approx([kept] * 4)
    assert len(set(moved[0])) == 1
    assert len(set(moved[180])) == 4
    run(options, gate="none", gate_scope="all", overwrite_output_dir=True)
    ungated = [line["temperature"] for line in records(options["output_dir"], "train")]
    assert moved[180] == pytest.approx(ungated, rel=1e-5)


def test_a_temperature_is_the_same_however_a_step_is_divided(options, tmp_path: Path) -> None:
    """With one contrastive batch a step, in one forward pass or in four."""
    options |= {"max_steps": 4, "objective": "scl", "dropout": 0.0, **LEARNED}
    run(options)
    chunks = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    run(options, contrastive_batch_size=16, output_dir=str(tmp_path / "chunks"), **chunks)
    one, other = (
        [line["temperature"] for line in records(directory, "train")]
        for directory in (options["output_dir"], tmp_path / "chunks")
    )
    assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"class_weights": "balanced"},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8, "gate": "none"},
        {"strategy": "two_stage", "num_train_epochs": 1, "fp16": True},
        {"gate_scope": "head"},
        {"strategy": "alternating", "memory_size": 0, "memory_warmup_steps": 0},
    ],
    ids=str,
)
def test_resumes_bitwise(options, changes: dict[str, Any], tmp_path: Path) -> None:
    options |= {"memory_size": 24, "memory_warmup_steps": 1, **LEARNED, **changes}
    options |= {"save_steps": 3, "eval_steps": 50}
    results = run(options)
    whole, parts = Path(options["output_dir"]), tmp_path / "parts"
    options["output_dir"] = str(parts)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_step(patch, 4, interrupt)
        run(options)
    resumed = run(options, resume_from_checkpoint="checkpoint-3")
    assert resumed["temperature"] == results["temperature"]
    assert records(parts) == records(whole)
    found = weights(parts)
    assert all(torch.equal(found[name], value) for name, value in weights(whole).items())


def interrupt(trainer: Trainer) -> None:
    raise KeyboardInterrupt


def test_resuming_without_the_memory_would_differ(options, monkeypatch, tmp_path: Path) -> None:
    """The test above can fail: an empty memory gives other losses."""
    options |= {"memory_size": 24, "save_steps": 3, "aux_weight": 0.5, "gate": "none"}
    run(options)
    whole = records(options["output_dir"], "train")
    monkeypatch.setattr(StepLosses, "load_state_dict", lambda self, state: None)
    run(options, resume_from_checkpoint="checkpoint-9")
    assert records(options["output_dir"], "train")[9] != whole[9]


def test_class_weights_are_those_of_the_anchors(options, calls, tmp_path: Path) -> None:
    file = tmp_path / "weights.json"
    file.write_text('{"negative": 1, "positive": 3}')
    results = run(options, class_weights=str(file), max_steps=1)
    (call,) = calls
    assert call["class_weights"].tolist() == pytest.approx([0.5, 1.5])
    assert results["class_weights"] == pytest.approx({"negative": 0.5, "positive": 1.5})
    x, y, label_embeddings = call["tensors"]
    each = acl_loss(x[0], y, label_embeddings[0], reduction="none")
    anchors = torch.tensor([0.5, 1.5])[torch.cat([y, torch.arange(2)])]
    torch.testing.assert_close(call["value"][0], (anchors * each).sum() / anchors.sum())


def test_an_implementation_that_lacks_it_is_refused(options) -> None:
    with pytest.raises(ValueError, match="impl='triton' cannot run: .*a tensor as temperature"):
        build_run(TrainingConfig.create(**{**options, "impl": "triton", **LEARNED}))


def test_losses_without_these_options_are_plain(options, calls) -> None:
    """Nothing that needs the wider losses of the kernels is passed by default."""
    run(options, max_steps=1)
    assert {call[name] for call in calls for name in NOTED} == {0.5, None}
