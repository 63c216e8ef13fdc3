"""Strategies: what each stage trains, that exits do not disturb each other, and whole runs."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fusedacl.engine import (
    EvaluationConfig,
    MultiExitConfig,
    MultiExitForSequenceClassification,
    TrainingConfig,
    evaluate,
)
from fusedacl.engine.backends.local import LocalBackend
from fusedacl.engine.config.fields import build
from fusedacl.engine.config.sections import ObjectiveOptions
from fusedacl.engine.model.multi_exit import MultiExitOutput, parse_layers
from fusedacl.engine.model.saved import load_tokenizer
from fusedacl.engine.objectives.losses import ExitLosses, Teacher, distillation, exit_losses
from fusedacl.engine.runtime.files import read_file
from fusedacl.engine.runtime.signals import Interrupted
from fusedacl.engine.training.builder import build_run
from fusedacl.engine.training.feature_cache import META_FILE
from fusedacl.engine.training.stages import (
    Stage,
    plan_stages,
    plan_steps,
    prepare,
    stage_outputs,
)
from fusedacl.kernels import acl_cl_loss, acl_loss
from tiny_runs import at_step, records, run, weights
from torch import Tensor
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification

CPU = torch.device("cpu")


def config_of(**options: Any) -> TrainingConfig:
    defaults = {"task_name": "quickstart", "output_dir": "unused", "learning_rate": 0.01}
    return TrainingConfig.create(**{**defaults, **options}).resolved()


def test_stages_of_each_strategy() -> None:
    def plan(**options: Any) -> list[Stage]:
        return plan_stages(config_of(num_train_epochs=4, **options), num_exits=3)

    (single,) = plan_stages(config_of(strategy="single"), num_exits=1)
    assert (single.exits, single.trains_backbone, single.has_teacher) == ((0,), True, False)
    (joint,) = plan(strategy="joint")
    assert (joint.exits, joint.exits_in_epoch(1)) == ((0, 1, 2), (0, 1, 2))
    (alternating,) = plan(strategy="alternating")
    assert [alternating.exits_in_epoch(epoch) for epoch in (1, 2, 3)] == [(2,), (0, 1, 2), (2,)]
    first, second = plan(strategy="two_stage", stage2_epochs=2, stage2_learning_rate=0.5)
    assert (first.exits, first.num_epochs, first.learning_rate) == ((2,), 4, 0.01)
    assert (second.exits, second.num_epochs, second.learning_rate) == ((0, 1), 2, 0.5)
    assert second.has_teacher and not second.trains_backbone
    config = config_of(strategy="two_stage", stage1_model="done", max_steps=7)
    done = plan_steps(config, num_exits=3, num_texts=64)
    assert [stage.exits for stage in done.stages] == [(0, 1)]
    assert done.ends == [7]


def model_of(*exit_layers: int, exit_head: str = "mha") -> MultiExitForSequenceClassification:
    backbone = BertConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48,
        vocab_size=60, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    exits = {"exit_layers": exit_layers, "exit_head": exit_head, "exit_width": 16}
    config = MultiExitConfig(backbone, **exits, exit_dropout=0.0, num_labels=3)
    return MultiExitForSequenceClassification(config)


def batches(number: int = 4) -> list[tuple[dict[str, Tensor], Tensor]]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for _ in range(number):
        tokens = torch.randint(5, 60, (12, 9), generator=generator)
        mask = (torch.arange(9) < torch.randint(3, 10, (12, 1), generator=generator)).long()
        made.append(({"input_ids": tokens, "attention_mask": mask}, tokens[:, 0] % 3))
    return made


def losses_of(
    model: MultiExitForSequenceClassification,
    stage: Stage,
    config: TrainingConfig,
    batch: dict[str, Tensor],
    labels: Tensor,
) -> tuple[MultiExitOutput, ExitLosses]:
    output, teacher = stage_outputs(model, stage, stage.exits, batch)
    label_embeddings = model.label_embeddings_of(stage.exits)
    return output, exit_losses(config.objective, output, label_embeddings, labels, teacher)


def train_stage(
    model: MultiExitForSequenceClassification, stage: Stage, config: TrainingConfig
) -> None:
    backend = LocalBackend(
        model, config, 4, CPU, groups=prepare(model, stage), independent=not stage.trains_backbone,
        learning_rate=stage.learning_rate, gate_scope="all",
    )  # fmt: skip
    for batch, labels in batches():
        _, losses = losses_of(model, stage, config, batch, labels)
        backend.backward(losses)
        backend.step()


@pytest.mark.parametrize("objective", ["ce", "scl", "acl"])
@pytest.mark.parametrize("head", ["mha", "linear"])
@pytest.mark.parametrize("exit_layers", [[1, 2, 3, 4], [1, 3, 4]])
def test_exits_together_equal_each_alone(exit_layers: list[int], objective: str, head: str) -> None:
    """On a frozen backbone, with clipping that acts, the gate and distillation.

    In float64: the bias of the attention's keys has gradient zero, and AdamW would make steps of
    what float32 leaves of it.
    """
    model = model_of(*exit_layers, exit_head=head).double()
    config = config_of(
        strategy="two_stage", objective=objective, aux_weight=0.3, distill_weight=0.4,
        max_grad_norm=0.05,
    )  # fmt: skip
    stage = plan_stages(config, num_exits=len(exit_layers))[1]
    together = copy.deepcopy(model)
    train_stage(together, stage, config)
    for position in stage.exits:
        alone = copy.deepcopy(model)
        only = Stage("alone", (position,), 1, 0.01, trains_backbone=False, has_teacher=True)
        train_stage(alone, only, config)
        exits = (each.exits[position].parameters() for each in (together, alone, model))
        for ours, theirs, before in zip(*exits, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
            assert not torch.equal(ours, before) or ours.grad is None
    frozen = (f"exits.{len(exit_layers) - 1}.", "backbone.")
    before, after = model.state_dict(), together.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith(frozen))


def test_frozen_parts_are_in_evaluation_mode_and_build_no_graph() -> None:
    model, config = model_of(1, 2, 3, 4), config_of(strategy="two_stage")
    stage = plan_stages(config, num_exits=4)[1]
    groups = prepare(model, stage)
    assert list(groups) == ["exit 1", "exit 2", "exit 3"]
    assert not model.backbone.training and not model.exits[3].training
    assert all(model.exits[position].training for position in stage.exits)
    batch, labels = batches(1)[0]
    output, losses = losses_of(model, stage, config, batch, labels)
    assert output.exit_logits.shape == (3, 12, 3)
    losses.weighted(0.5).backward()
    assert all(p.grad is None for p in [*model.backbone.parameters(), *model.exits[3].parameters()])
    assert all(p.grad is not None for p in model.exits[:3].parameters())


def test_losses_with_a_teacher() -> None:
    output = MultiExitOutput(exit_logits=torch.randn(2, 7, 3), exit_embeddings=torch.randn(2, 7, 5))
    labels, label_embeddings = torch.randint(3, (7,)), torch.randn(2, 3, 5)
    teacher = Teacher(torch.randn(7, 5), torch.randn(3, 5), torch.randn(7, 3))
    options = ObjectiveOptions(
        objective="acl", cross_layer=True, distill_weight=0.25, distill_temperature=3.0
    )
    losses = exit_losses(options, output, label_embeddings, labels, teacher)
    expected = acl_cl_loss(
        output.exit_embeddings, labels, label_embeddings,
        teacher.embeddings, teacher.label_embeddings, temperature=0.5,
    )  # fmt: skip
    torch.testing.assert_close(losses.auxiliary, expected)
    for index in range(2):
        wanted = functional.softmax(teacher.logits / 3, dim=1)
        divergence = functional.kl_div(
            functional.log_softmax(output.exit_logits[index] / 3, dim=1), wanted,
            reduction="batchmean",
        )  # fmt: skip
        cross_entropy = functional.cross_entropy(output.exit_logits[index], labels)
        torch.testing.assert_close(losses.main[index], 0.75 * cross_entropy + 0.25 * 9 * divergence)
    options = ObjectiveOptions(objective="acl", cross_layer=False)
    losses = exit_losses(options, output, label_embeddings, labels, teacher)
    expected = acl_loss(output.exit_embeddings, labels, label_embeddings, temperature=0.5)
    torch.testing.assert_close(losses.auxiliary, expected)
    same = torch.randn(1, 4, 3)
    assert distillation(same, same[0], 2.0).item() == pytest.approx(0, abs=1e-6)


@pytest.fixture
def options(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "save_steps": None, "save_total_limit": None}


@pytest.mark.parametrize(
    ("encoder", "exit_layers"),
    [("tiny_bert", None), ("deep_bert", "2,4")],
    ids=["every layer", "layers 2 and 4 of 4"],
)
@pytest.mark.parametrize(
    ("strategy", "feature_cache"),
    [("joint", False), ("alternating", False), ("two_stage", False), ("two_stage", True)],
)
def test_every_strategy_learns(
    options,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    encoder: str,
    exit_layers: str | None,
    strategy: str,
    feature_cache: bool,
) -> None:
    options["model_name_or_path"] = str(request.getfixturevalue(encoder))
    if feature_cache:
        options["feature_cache"] = str(tmp_path / "cache")
    results = run(
        options, strategy=strategy, exit_layers=exit_layers, num_train_epochs=10, save_steps=0
    )
    by_layer = results["metrics"]["validation"]
    first, last = layers = parse_layers(exit_layers) or [1, 2]
    assert list(by_layer) == layers
    assert min(scores["accuracy"] for scores in by_layer.values()) > 0.7  # chance: 0.5
    groups = {row["group"] for row in results["gate"]}
    shared = {f"exit {first}", f"exit {last}", "backbone"}
    assert groups == ({"model", f"exit {first}"} if strategy == "two_stage" else shared)
    if feature_cache:
        assert json.loads((tmp_path / "cache" / META_FILE).read_text())["layers"] == layers
    source = {name: options[name] for name in ("task_name", "data_dir", "disable_tqdm")}
    saved = {**source, "model_name_or_path": str(tmp_path / "run")}
    again = evaluate(build(EvaluationConfig, saved))["validation"]
    assert list(again) == layers
    for layer in layers:
        assert again[layer] == pytest.approx(by_layer[layer], rel=1e-5)


def test_second_stage_leaves_the_first_ones_model(options, tmp_path: Path) -> None:
    """Between the stages the run is evaluated and saved."""
    run(options, strategy="two_stage", max_steps=3)
    directory = tmp_path / "run"
    names = {path.name for path in directory.glob("checkpoint-*")}
    assert "checkpoint-3" in names
    evaluated = {(r["step"], r["exit"]) for r in records(directory) if "exit" in r}
    assert {(3, 2), (6, 1), (6, 2)} <= evaluated
    before, after = weights(directory / "checkpoint-3"), weights(directory)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("exits.0.") for name in changed)


def test_second_stage_on_an_existing_model(options, tiny_data: Path, tmp_path: Path) -> None:
    first = str(tmp_path / "first")
    run(options, output_dir=first)
    encoder = options["model_name_or_path"]
    second = {**options, "model_name_or_path": None, "stage1_model": first}
    results = run(second, strategy="two_stage")
    assert results["num_steps"] == 12
    before, after = weights(tmp_path / "first"), weights(tmp_path / "run")
    for name, value in before.items():
        assert torch.equal(after[name.replace("exits.0.", "exits.1.")], value)
    (tmp_path / "moods").mkdir()
    for file in (tiny_data / "opinions").iterdir():
        moods = file.read_text().replace("negative", "sad").replace("positive", "glad")
        (tmp_path / "moods" / file.name).write_text(moods)
    other = {"task_name": "moods", "data_dir": str(tmp_path)}
    for changes, message in (
        (other, r"has classes \['negative', 'positive'\], this run \['glad', 'sad'\]"),
        ({"exit_head": "linear"}, "stage1_model=.*has exit_head mha, this run linear"),
        ({"exit_pooling": "mean"}, "exit_pooling=mean is for linear exits"),
        ({"exit_width": 32}, "exits of width 64 with 4 heads, this run 32"),
        ({"exit_layers": "1"}, "has last exit layer 2, this run 1"),
        ({"model_name_or_path": "x"}, "leave model_name_or_path out"),
        ({"stage1_model": "./absent"}, "^stage1_model='./absent' cannot be loaded"),
        ({"stage1_model": str(tmp_path)}, "^stage1_model=.* holds no config.json"),
        ({"stage1_model": encoder}, "^stage1_model=.* is a bert model, not one that"),
    ):
        with pytest.raises(ValueError, match=message):
            run({**second, "output_dir": str(tmp_path / "no")}, strategy="two_stage", **changes)


def test_the_length_of_texts_is_that_of_the_first_stage(options, tmp_path: Path, caplog) -> None:
    first = str(tmp_path / "first")
    run(options, output_dir=first, max_steps=1, max_seq_length=6)
    second = {**options, "model_name_or_path": None, "stage1_model": first, "max_seq_length": None}
    second["strategy"] = "two_stage"
    parts = build_run(TrainingConfig.create(**second))
    assert parts.model.config.max_seq_length == parts.train_split.max_length == 6
    assert "stage1_model was trained" not in caplog.text
    parts = build_run(TrainingConfig.create(**{**second, "max_seq_length": 8}))
    assert parts.model.config.max_seq_length == 8
    words = "max_seq_length=8: the model of stage1_model was trained with 6. Leave max_seq_length"
    assert words in caplog.text


def test_a_plain_classifier_becomes_a_first_stage(options, tmp_path: Path) -> None:
    """The command in the refusal makes a first stage of it."""
    classifier, first = str(tmp_path / "classifier"), str(tmp_path / "first")
    encoder = options["model_name_or_path"]
    BertForSequenceClassification.from_pretrained(encoder).save_pretrained(classifier)
    load_tokenizer(encoder).save_pretrained(classifier)
    second = {**options, "model_name_or_path": None, "strategy": "two_stage", "max_steps": 1}
    with pytest.raises(ValueError, match=f"`fusedacl train --model_name_or_path {classifier} "):
        run(second, stage1_model=classifier)
    run(options, model_name_or_path=classifier, output_dir=first, max_steps=1)
    results = run(second, stage1_model=first)
    assert list(results["metrics"]["validation"]) == [1, 2]


def test_alternating_rests_the_other_exits_in_odd_epochs(options, tmp_path: Path) -> None:
    run(options, strategy="alternating")
    first, second, third = (weights(tmp_path / f"run/checkpoint-{step}") for step in (4, 8, 12))

    def moved(one: dict[str, Tensor], other: dict[str, Tensor], prefix: str) -> bool:
        names = (name for name in one if name.startswith(prefix))
        return any(not torch.equal(one[name], other[name]) for name in names)

    assert moved(first, second, "exits.0.") and not moved(second, third, "exits.0.")
    for prefix in ("exits.1.", "backbone."):
        assert moved(first, second, prefix) and moved(second, third, prefix)


def test_the_log_has_cross_entropy_beside_distillation(options, tmp_path: Path) -> None:
    run(options, strategy="two_stage", max_steps=2, distill_weight=1.0, objective="ce")
    second = [r for r in records(tmp_path / "run") if r.get("stage") == "exits"]
    assert second and all(record["loss"] != record["loss_ce"] for record in second)


def test_a_written_configuration_can_be_varied(options, tmp_path: Path) -> None:
    """The file holds the given options only; implied ones are derived again."""
    run(options, strategy="two_stage", max_steps=1)
    written = read_file(tmp_path / "run" / "config.yaml")
    for changes in ({"objective": "ce"}, {"strategy": "joint"}):
        TrainingConfig.create(**{**written, **changes}).resolved()


@pytest.mark.parametrize("stop", [6, 12, 14])
def test_resuming_in_either_stage_gives_the_same_bits(
    options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    options = {**options, "strategy": "two_stage", "stage2_epochs": 2}
    run(options)
    again = {**options, "output_dir": str(tmp_path / "again")}
    with monkeypatch.context() as patch:
        at_step(patch, stop, lambda trainer: setattr(trainer.signals, "received", 15))
        with pytest.raises(Interrupted):
            run(again)
    run(again, resume_from_checkpoint="latest")
    whole, resumed = weights(tmp_path / "run"), weights(tmp_path / "again")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_truncated_backbone(options) -> None:
    results = run(options, num_hidden_layers=1, max_steps=2)
    assert list(results["metrics"]["validation"]) == [1]


def test_layers_as_users_write_them() -> None:
    assert parse_layers("2, 4,6") == [2, 4, 6] == parse_layers("[2, 4, 6]")
    assert parse_layers("all") == [] == parse_layers(None)
    with pytest.raises(ValueError, match="exit_layers='2-4' is neither 'all' nor a list"):
        parse_layers("2-4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exit_layers": "1"}, "strategy=single trains the last layer's exit only"),
        ({"cross_layer": True}, "cross_layer=True belongs to the second stage"),
        ({"strategy": "joint", "distill_weight": 0.5}, "distill_weight=0.5 belongs to the second"),
        ({"strategy": "joint", "stage1_model": "x", "model_name_or_path": None}, "stage1_model=x"),
        ({"strategy": "two_stage", "objective": "ce", "cross_layer": True}, "needs objective=acl"),
        ({"strategy": "joint", "exit_layers": "1,3"}, r"\[1, 3\]: .* layers 1 to 2 only"),
        ({"strategy": "two_stage", "exit_layers": "1"}, "exit on the last layer"),
        ({"strategy": "two_stage", "exit_layers": "2"}, "at least one exit before the last"),
        ({"strategy": "jiont"}, "Did you mean 'joint'"),
        ({"strategy": "joint", "feature_cache": "x"}, "feature_cache=.* belongs to the second"),
        ({"strategy": "alternating", "num_train_epochs": 1}, "num_train_epochs of 2 or more"),
        ({"num_hidden_layers": 5}, "num_hidden_layers=5: the encoder has 2 layers only"),
    ],
)
def test_bad_options_stop_the_run_before_it_starts(options, changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(options, **changes)
