"""ACLTrainer: the losses and decisions of a plain loop, and what Trainer's options do with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fusedacl.engine import ACLTrainer, AngleMonitor, GradientGate
from fusedacl.engine.objectives.gate_cut import ScopedGate
from trainer_cases import (
    Recorder,
    arguments,
    collate,
    exit_model,
    losses_of,
    plain_loop,
    plain_model,
    rows,
    steps,
    trainer_of,
)
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

CLOSE = {"rel": 2e-4, "abs": 1e-5}


def without_encoder(encoder: Path) -> Any:
    model = plain_model(encoder)
    model.bert.requires_grad_(False)
    return model


def without_last_layer(encoder: Path) -> Any:
    model = plain_model(encoder)
    for module in (model.bert.encoder.layer[-1], model.bert.pooler, model.classifier):
        module.requires_grad_(False)
    return model


def windows(batches: list[Any], size: int) -> list[list[Any]]:
    return [batches[start : start + size] for start in range(0, len(batches), size)]


def names_of(model: Any, strategy: str) -> tuple[list[str], list[int] | None]:
    """Keys of the angles in the log, and the group of each trained parameter."""
    if strategy not in ("joint", "second_stage"):
        return ["angle_degrees"], None
    numbers = [1, 2] if strategy == "joint" else [1]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    if strategy == "second_stage":
        return ["angle_degrees"], None
    order = ["exits.0", "exits.1", "backbone"]
    groups = [next(i for i, start in enumerate(order) if n.startswith(start)) for n in trained]
    return [*(f"angle_degrees_exit_{n}" for n in numbers), "angle_degrees_backbone"], groups


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("strategy", ["plain", "single", "joint", "second_stage"])
def test_losses_and_decisions_are_those_of_a_plain_loop(
    tiny_bert: Path, tmp_path: Path, strategy: str, accumulation: int
) -> None:
    """With 10 texts, the second batch of an epoch has 4 of them, and not 6."""
    make = plain_model if strategy == "plain" else exit_model
    model, recorder = make(tiny_bert), Recorder()
    trainer = trainer_of(
        model,
        tmp_path,
        number=10,
        strategy=None if strategy == "plain" else strategy,
        gradient_accumulation_steps=accumulation,
        data_collator=recorder,
    )
    trainer.train()
    other = make(tiny_bert)
    if strategy == "second_stage":
        other.backbone.requires_grad_(False).eval()
        other.exits[-1].requires_grad_(False)
    elif strategy == "single":
        other.exits[0].requires_grad_(False)
    names, groups = names_of(other, strategy)
    expected = plain_loop(
        other, windows(recorder.batches, accumulation)[:3], strategy, groups=groups
    )
    assert len(steps(trainer)) == 3
    for found, wanted in zip(steps(trainer), expected, strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], **CLOSE)
        for name, angle, kept in zip(names, wanted["angles"], wanted["kept"], strict=True):
            assert found[name] == pytest.approx(float(angle), abs=0.02)
            assert found[name.replace("angle_degrees", "gate_kept")] == float(kept)
    for found, wanted in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-5)


def test_the_head_scope_follows_the_pooling_of_the_exit(tiny_bert: Path, tmp_path: Path) -> None:
    exits = {"exit_head": "linear", "exit_pooling": "mean"}
    recorder = Recorder()
    trainer = trainer_of(
        exit_model(tiny_bert, **exits),
        tmp_path,
        max_steps=1,
        gate_scope="head",
        strategy="single",
        data_collator=recorder,
    )
    trainer.train()
    other = exit_model(tiny_bert, **exits)
    trained = [p for p in other.parameters() if p.requires_grad]
    gate = ScopedGate(other, trained, "head", weight=0.3)
    gate.accumulate(*(x.sum() for x in losses_of(other, recorder.batches[0], "single")))
    found = steps(trainer)[0]["angle_degrees"]
    assert found == pytest.approx(gate.combine().angle.item(), abs=0.05)


def test_a_model_that_is_refused_is_left_as_it_was(tiny_bert: Path, tmp_path: Path) -> None:
    model = plain_model(tiny_bert)
    with pytest.raises(ValueError, match="needs a model with several exits"):
        trainer_of(model, tmp_path, strategy="joint")
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_the_gate_drops_and_keeps_as_the_limit_says(tiny_bert: Path, tmp_path: Path) -> None:
    for max_angle, kept in ((0.0, 0.0), (180.0, 1.0)):
        trainer = trainer_of(plain_model(tiny_bert), tmp_path, max_angle=max_angle)
        trainer.train()
        assert [step["gate_kept"] for step in steps(trainer)] == [kept] * 3


@pytest.mark.parametrize("options", [{"objective": "ce"}, {"objective": "scl"}, {"gate": "none"}])
def test_without_the_gate_the_weighted_sum_is_trained(
    tiny_bert: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    trainer = trainer_of(plain_model(tiny_bert), tmp_path, **options)
    trainer.train()
    for step in steps(trainer):
        assert "angle_degrees" not in step
        weighted = step["loss_ce"]
        if "loss_aux" in step:
            weighted = 0.7 * step["loss_ce"] + 0.3 * step["loss_aux"]
        assert step["loss"] == pytest.approx(weighted, rel=1e-4)
    assert ("loss_aux" in step) == (options.get("objective") != "ce")


@pytest.mark.parametrize("multi_exit", [False, True])
@pytest.mark.parametrize("scope", ["top:1", "head"])
def test_a_scope_decides_by_its_own_gradients(
    tiny_bert: Path, tmp_path: Path, scope: str, multi_exit: bool
) -> None:
    model, recorder = (exit_model if multi_exit else plain_model)(tiny_bert), Recorder()
    strategy = "single" if multi_exit else "plain"
    trainer = trainer_of(
        model,
        tmp_path,
        max_steps=1,
        gate_scope=scope,
        strategy="single",
        data_collator=recorder,
    )
    trainer.train()
    other = (exit_model if multi_exit else plain_model)(tiny_bert)
    trained = [p for p in other.parameters() if p.requires_grad]
    found = steps(trainer)[0]["angle_degrees"]
    if multi_exit:
        gate = ScopedGate(other, trained, scope, weight=0.3)
        main, auxiliary = (x.sum() for x in losses_of(other, recorder.batches[0], strategy))
        # The loss by hand reads the leaf in place of what the classifier has read.
        gate.accumulate(main, auxiliary)
        assert found == pytest.approx(gate.combine().angle.item(), abs=0.05)
        return
    main, auxiliary = (x.sum() for x in losses_of(other, recorder.batches[0], strategy))
    if scope == "top:1":
        # The pooler lies inside the encoder and above its last layer, as the classifier does.
        above = (other.bert.encoder.layer[-1], other.bert.pooler, other.classifier)
        tensors = [p for module in above for p in module.parameters()]
        wanted = GradientGate(trained).backward(main, auxiliary, scope=tensors).angle.item()
        assert found == pytest.approx(wanted, abs=0.05)
    else:
        assert 0 < found < 180


def test_label_smoothing_is_that_of_the_cross_entropy(tiny_bert: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = trainer_of(
        plain_model(tiny_bert), tmp_path, label_smoothing_factor=0.2, data_collator=recorder
    )
    trainer.train()
    expected = plain_loop(
        plain_model(tiny_bert), windows(recorder.batches, 1)[:3], "plain", smoothing=0.2
    )
    for found, wanted in zip(steps(trainer), expected, strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], **CLOSE)


TRIED: dict[str, dict[str, Any]] = {
    "bf16": {"bf16": True},
    "schedule": {"lr_scheduler_type": "cosine", "warmup_steps": 1},
    "accumulation": {"gradient_accumulation_steps": 2, "max_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "checkpointing, head": {"gradient_checkpointing": True, "gate_scope": "head"},
    "reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "no clipping": {"max_grad_norm": 0.0},
    "adafactor": {"optim": "adafactor"},
}


@pytest.mark.parametrize("name", TRIED)
def test_options_of_trainer_work(tiny_bert: Path, tmp_path: Path, name: str) -> None:
    model = plain_model(tiny_bert)
    before = [p.detach().clone() for p in model.parameters()]
    trainer = trainer_of(model, tmp_path, **TRIED[name])
    trainer.train()
    for step in steps(trainer):
        assert 0 < step["angle_degrees"] < 180
        assert step["grad_norm"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("overflows", [False, True])
def test_a_loss_scale_changes_nothing_but_what_overflows(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overflows: bool
) -> None:
    """accelerate gives CPUs no scaler, so the trainer is given one."""
    plain = trainer_of(plain_model(tiny_bert), tmp_path, max_steps=1)
    plain.train()
    model = plain_model(tiny_bert)
    before = [p.detach().clone() for p in model.parameters()]
    trainer = trainer_of(model, tmp_path, max_steps=1)
    scale = 2.0**127 if overflows else 2.0**10
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    accelerator = trainer.accelerator
    monkeypatch.setattr(accelerator, "scaler", scaler)
    monkeypatch.setattr(
        accelerator, "unscale_gradients", lambda: scaler.unscale_(trainer.optimizer.optimizer)
    )
    trainer.train()
    moved = any(not torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert moved != overflows
    assert scaler.get_scale() == (scale / 2 if overflows else scale)
    if overflows:
        assert "angle_degrees" not in steps(trainer)[0]
    else:
        for key in ("loss", "angle_degrees", "grad_norm"):
            assert steps(trainer)[0][key] == pytest.approx(steps(plain)[0][key], rel=1e-4)


def test_a_compiled_model_decides_alike(tiny_bert: Path, tmp_path: Path) -> None:
    found = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        trainer = trainer_of(plain_model(tiny_bert), tmp_path, max_steps=1, **options)
        trainer.train()
        found.append(steps(trainer))
    for eager, compiled in zip(*found, strict=True):
        assert compiled["angle_degrees"] == pytest.approx(eager["angle_degrees"], abs=0.05)
        assert compiled["loss"] == pytest.approx(eager["loss"], **CLOSE)


def test_checkpoints_resume_and_the_best_model_is_loaded(tiny_bert: Path, tmp_path: Path) -> None:
    options = {
        "eval_dataset": rows(12),
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 4,
        "load_best_model_at_end": True,
    }
    whole = trainer_of(exit_model(tiny_bert), tmp_path / "whole", **options)
    whole.train()
    resumed = trainer_of(exit_model(tiny_bert), tmp_path / "whole", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert steps(resumed)[-1] == pytest.approx(steps(whole)[-1], rel=1e-5)
    assert whole.state.best_model_checkpoint is not None


def test_training_stops_early(tiny_bert: Path, tmp_path: Path) -> None:
    trainer = trainer_of(
        plain_model(tiny_bert),
        tmp_path,
        learning_rate=0.0,
        max_steps=8,
        eval_dataset=rows(6),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        callbacks=[EarlyStoppingCallback(2)],
    )
    trainer.train()
    assert trainer.state.global_step == 3


def test_the_model_is_as_before_after_training(tiny_bert: Path, tmp_path: Path) -> None:
    model = exit_model(tiny_bert)
    model.backbone.embeddings.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    trainer_of(model, tmp_path, strategy="second_stage", max_steps=1).train()
    assert [p.requires_grad for p in model.parameters()] == before
    for module in (model, model.exits[-1], model.exits[-1].classifier):
        assert not (module._forward_hooks or module._forward_pre_hooks)
    trainer_of(model, tmp_path, strategy="joint", max_steps=1).train()


def test_the_second_stage_trains_the_exits_before_the_last(tiny_bert: Path, tmp_path: Path) -> None:
    model = exit_model(tiny_bert)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = trainer_of(model, tmp_path, strategy="second_stage", distill_weight=0.5, max_steps=2)
    trainer.train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if name.startswith("exits.0.")}


@pytest.mark.parametrize(
    ("made", "options", "words"),
    [
        (plain_model, {"compute_loss_func": lambda *a, **k: 0}, "computes its own losses"),
        (plain_model, {"strategy": "joint"}, "strategy=joint needs a model with several exits"),
        (plain_model, {"objective": "aclx"}, "objective='aclx' is not a choice"),
        (plain_model, {"strategy": "jont"}, "Did you mean 'joint'|did you mean 'joint'"),
        (plain_model, {"objective": "ce", "gate": "angle"}, "gate=angle needs a contrastive loss"),
        (plain_model, {"gate_scope": "top:9"}, "the encoder has 2 layers"),
        (plain_model, {"gate_scope": "head", "gradient_accumulation_steps": 2}, "decides within"),
        (exit_model, {"gate_scope": "head"}, "there is no single one to take"),
        (plain_model, {"aux_weight": 2.0}, "out of range"),
        (plain_model, {"distill_weight": 0.5}, "second stage"),
        (
            plain_model,
            {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": True},
                "gate_scope": "head",
            },
            "gate_scope=head does not work with use_reentrant=True",
        ),
        (plain_model, {"gate_scope": "head", "torch_compile": True}, "Use gate_scope=top:1 or all"),
        (without_encoder, {"gate_scope": "head"}, "nothing to train in or below it"),
        (without_last_layer, {"gate_scope": "top:1"}, "Use gate_scope=all, or freeze fewer"),
        (plain_model, {"optim": "lomo"}, "steps during the backward pass"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_before_training(
    tiny_bert: Path, tmp_path: Path, made: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        trainer_of(made(tiny_bert), tmp_path, **options)


def test_arguments_of_trainer_itself_are_refused(tiny_bert: Path, tmp_path: Path) -> None:
    given = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(TypeError, match="pass ACLTrainingArguments"):
        ACLTrainer(plain_model(tiny_bert), given, train_dataset=rows(6))


def test_batches_without_class_indices_are_refused(tiny_bert: Path, tmp_path: Path) -> None:
    for change, words in (
        (lambda batch: batch.pop("labels"), "The batch has no labels"),
        (lambda batch: batch.update(labels=batch["labels"].float()), "must hold one class index"),
    ):

        def broken(features: Any, change: Any = change) -> Any:
            batch = collate(features)
            change(batch)
            return batch

        with pytest.raises(ValueError, match=words):
            trainer_of(plain_model(tiny_bert), tmp_path, data_collator=broken).train()


def test_a_monitor_measures_what_the_gate_would_see(tiny_bert: Path, tmp_path: Path) -> None:
    gated = trainer_of(plain_model(tiny_bert), tmp_path, max_steps=1)
    gated.train()
    monitor = AngleMonitor(every=2, name="measured")
    trainer = trainer_of(plain_model(tiny_bert), tmp_path, gate="none", callbacks=[monitor])
    trainer.train()
    measured = [step.get("measured") for step in steps(trainer)]
    assert measured[0] == pytest.approx(steps(gated)[0]["angle_degrees"], abs=0.02)
    assert measured[1] is None and measured[2] is not None
    with pytest.raises(ValueError, match="the gate logs its own angle under this name"):
        trainer_of(plain_model(tiny_bert), tmp_path, callbacks=[AngleMonitor()]).train()


def test_a_monitor_refuses_a_loop_with_one_loss(tiny_bert: Path, tmp_path: Path) -> None:
    trainers = (
        trainer_of(plain_model(tiny_bert), tmp_path, objective="ce", callbacks=[AngleMonitor()]),
        Trainer(
            plain_model(tiny_bert),
            TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, max_steps=1),
            train_dataset=rows(6),
            data_collator=collate,
            callbacks=[AngleMonitor()],
        ),
    )
    for trainer in trainers:
        with pytest.raises(ValueError, match="this loop gives one loss"):
            trainer.train()


def test_arguments_are_read_from_a_command_line(tmp_path: Path) -> None:
    from transformers import HfArgumentParser

    parser = HfArgumentParser(type(arguments(tmp_path)))  # type: ignore[arg-type]
    words = ["--output_dir", str(tmp_path), "--objective", "scl", "--gate", "angle"]
    (parsed,) = parser.parse_args_into_dataclasses([*words, "--cross_layer", "false", "--use_cpu"])
    assert (parsed.objective, parsed.gate, parsed.strategy) == ("scl", "angle", None)
