"""ACLTrainer with texts that do not count, windows without a step, and layers that are frozen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fusedacl.engine import ACLTrainer, GradientGate
from fusedacl.engine.integrations.gates import ScopeDecision
from fusedacl.engine.integrations.objective import TrainerObjective
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.utils.data import IterableDataset
from trainer_cases import arguments, collate, exit_model, losses_of, plain_model, steps, trainer_of
from trainer_cases import rows as numbered

IGNORED = -100


def some_ignored(features: Any) -> Any:
    """A batch of which the second and later texts of a first half do not count."""
    batch = collate(features)
    batch["labels"][1 : 1 + len(features) // 2] = IGNORED
    return batch


@pytest.mark.parametrize("options", [{}, {"gate": "none"}, {"gate_scope": "head"}])
def test_texts_that_are_ignored_are_in_no_mean(
    tiny_bert: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    batches: list[Any] = []

    def keep(features: Any) -> Any:
        batches.append(some_ignored(features))
        return batches[-1]

    model = plain_model(tiny_bert)
    trainer = trainer_of(model, tmp_path, max_steps=1, data_collator=keep, **options)
    trainer.train()
    other = plain_model(tiny_bert)
    assert steps(trainer)[0]["loss_ce"] == pytest.approx(other(**batches[0]).loss.item(), rel=1e-5)
    counted = batches[0]["labels"] != IGNORED
    fewer = {name: part[counted] for name, part in batches[0].items()}
    _, auxiliary = losses_of(other, fewer, "plain")
    assert steps(trainer)[0]["loss_aux"] == pytest.approx(auxiliary.item(), rel=1e-5)


def test_a_batch_counts_by_its_texts_that_are_not_ignored(tiny_bert: Path, tmp_path: Path) -> None:
    """Of two batches of a step; the third window has one of which no text counts."""
    ignored = iter([(0, 0), (1, 5), (0, 6), (0, 0)])
    batches: list[Any] = []

    def keep(features: Any) -> Any:
        batches.append(collate(features))
        batches[-1]["labels"][slice(*next(ignored, (0, 0)))] = IGNORED
        return batches[-1]

    trainer = trainer_of(
        plain_model(tiny_bert),
        tmp_path,
        learning_rate=0.0,
        max_steps=2,
        gradient_accumulation_steps=2,
        data_collator=keep,
    )
    trainer.train()
    other = plain_model(tiny_bert)
    for step, pair in zip(steps(trainer), (batches[:2], batches[2:4]), strict=True):
        whole = {name: torch.cat([batch[name] for batch in pair]) for name in pair[0]}
        assert step["loss_ce"] == pytest.approx(other(**whole).loss.item(), rel=1e-5)


class Endless(IterableDataset[Any]):
    """A data set without a length, of which Trainer does not know when an epoch ends."""

    def __iter__(self) -> Iterator[Any]:
        return iter(numbered(18))


def test_leftover_batches_have_both_gradients(tiny_bert: Path, tmp_path: Path) -> None:
    """An epoch has three batches, so the second step has those of two windows, of 1 and of 2."""
    batches: list[Any] = []

    def keep(features: Any) -> Any:
        batches.append(collate(features))
        return batches[-1]

    trainer = ACLTrainer(
        plain_model(tiny_bert),
        arguments(tmp_path, learning_rate=0.0, max_steps=2, gradient_accumulation_steps=2),
        train_dataset=Endless(),
        data_collator=keep,
    )
    trainer.train()
    model = plain_model(tiny_bert)
    gate = GradientGate(model.parameters(), weight=0.3)
    total = torch.zeros(2)
    for share, batch in zip((1.0, 0.5, 0.5), (batches[2], batches[0], batches[1]), strict=True):
        main, auxiliary = (share * loss.sum() for loss in losses_of(model, batch, "plain"))
        gate.accumulate(main, auxiliary)
        total += torch.stack([main, auxiliary]).detach()
    wanted, found = gate.combine(), steps(trainer)[1]
    assert found["angle_degrees"] == pytest.approx(wanted.angle.item(), abs=0.02)
    used = wanted.weight.item()
    weighted = (1 - used) * total[0].item() + used * total[1].item()
    assert found["loss"] == pytest.approx(weighted, rel=1e-4)


def test_exits_that_are_frozen_stay_so_in_the_second_stage(tiny_bert: Path, tmp_path: Path) -> None:
    model = exit_model(tiny_bert)
    model.exits[0].requires_grad_(False)
    with pytest.raises(ValueError, match="so nothing is trained"):
        trainer_of(model, tmp_path, strategy="second_stage")
    model.exits[0].classifier.requires_grad_(True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer_of(model, tmp_path, strategy="second_stage", max_steps=1).train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(name.startswith("exits.0.classifier.") for name in moved)


def test_exits_on_a_frozen_encoder_decide_for_themselves(tiny_bert: Path, tmp_path: Path) -> None:
    model = exit_model(tiny_bert)
    model.backbone.requires_grad_(False)
    trainer = trainer_of(model, tmp_path, strategy="joint", max_steps=1)
    trainer.train()
    angles = {name for name in steps(trainer)[0] if name.startswith("angle_degrees")}
    assert angles == {"angle_degrees_exit_1", "angle_degrees_exit_2"}


def test_a_model_is_restored_though_its_layers_were_wrapped(
    tiny_bert: Path, tmp_path: Path
) -> None:
    model = exit_model(tiny_bert)
    model.backbone.embeddings.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    objective = TrainerObjective(model, arguments(tmp_path, strategy="second_stage"))
    layers = list(model.backbone.encoder.layer)
    apply_activation_checkpointing(model, check_fn=lambda module: module in layers)
    model.exits.add_module("0", torch.compile(model.exits[0]))
    objective.close()
    assert [p.requires_grad for p in model.parameters()] == before


def test_a_scope_that_the_cross_entropy_does_not_reach_is_refused(
    tiny_bert: Path, tmp_path: Path
) -> None:
    """As in a compiled model, whose logits do not depend on what its classifier is seen to read."""
    model = plain_model(tiny_bert)
    objective = TrainerObjective(model, arguments(tmp_path, gate_scope="head"))
    decision = ScopeDecision(objective.classifiers, "head", objective.config.objective, None)
    losses, _ = objective.losses(model, collate(numbered(6)), None)
    objective.classifiers.last_input = torch.zeros(6, 32, requires_grad=True)
    with pytest.raises(ValueError, match="does not reach it, as in a model that is compiled"):
        decision.weigh(losses, 1.0)
