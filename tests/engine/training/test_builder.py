"""Options of a run that change its encoder, its loss, its batches or its last words."""

from __future__ import annotations

import csv
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fusedacl.engine import TrainingConfig
from fusedacl.engine.training import trainer
from fusedacl.engine.training.builder import build_run
from fusedacl.engine.training.storage import hub
from tiny_runs import at_step, records, run, weights

LABELS = ("negative", "positive")
FIRST_LAYER = re.compile(r"backbone\.(embeddings|encoder\.layer\.0)\.")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def opinions(data: Path, split: str, number: int) -> list[dict[str, Any]]:
    """The first rows of a split, whose labels alternate."""
    lines = (data / "opinions" / f"{split}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[:number]]


def assert_alike(ours: Path, theirs: Path, tolerance: float = 1e-5) -> None:
    found, expected = weights(ours), weights(theirs)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        # The bias of the keys changes no softmax: its gradient is rounding.
        if not name.endswith("key.bias"):
            assert torch.allclose(value, expected[name], atol=tolerance), name


LARGE = {"contrastive_batch_size": 16, "gradient_accumulation_steps": 2}
ENCODERS: list[dict[str, Any]] = [
    {"gate_scope": "top:1"},
    {"strategy": "two_stage", "per_device_train_batch_size": 8, **LARGE},
]


@pytest.mark.parametrize("changes", ENCODERS, ids=str)
def test_checkpointed_layers_train_alike(options, changes: dict[str, Any], tmp_path: Path) -> None:
    """With dropout, and both backward passes of the gate."""
    options |= {"max_steps": 3, "learning_rate": 1e-3, **changes}
    run(options)
    run(options, gradient_checkpointing=True, output_dir=str(tmp_path / "checkpointed"))
    assert_alike(tmp_path / "checkpointed", Path(options["output_dir"]))


def test_a_compiled_encoder_trains_alike(options, tmp_path: Path) -> None:
    """Both backward passes of the gate go through one compiled graph."""
    options |= {"max_steps": 2, "learning_rate": 1e-3, "dropout": 0.0, "num_hidden_layers": 1}
    run(options)
    compiled = {"torch_compile_backend": "aot_eager", "output_dir": str(tmp_path / "compiled")}
    run(options, **compiled)
    assert_alike(tmp_path / "compiled", Path(options["output_dir"]))


@pytest.mark.parametrize("strategy", ["joint", "two_stage"])
def test_frozen_layers_stay_as_they_are(options, strategy: str, tiny_bert: Path) -> None:
    options |= {"strategy": strategy, "freeze_layers": 1, "num_train_epochs": 2}
    run(options)
    before = weights(tiny_bert)
    changed = set()
    for name, value in weights(options["output_dir"]).items():
        same = before.get(name.replace("backbone.", "bert."))
        if FIRST_LAYER.match(name):
            assert same is not None and torch.equal(value, same), name
        elif same is not None and not torch.equal(value, same):
            changed.add(name.split(".")[3])
    assert changed == {"1"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze_layers": 3}, "freeze_layers=3: the encoder has 2 layers"),
        ({"freeze_layers": 1, "gate_scope": "top:1"}, "nothing to train below the cut"),
        (
            {"freeze_layers": 2, "gate_scope": "head", "exit_head": "linear"},
            "nothing to train below the cut of gate_scope=head",
        ),
        ({"gate_scope": "top:1", "torch_compile": True}, "which torch_compile would join"),
        ({"torch_compile_backend": "quick"}, "torch_compile: Invalid backend: 'quick'"),
        ({"torch_compile_mode": "quick"}, "torch_compile: Unrecognized mode=quick"),
        ({"attn_implementation": "quick"}, "quick"),
        ({"model_revision": "v2"}, "is a local directory, which has one version"),
        ({"tokenizer_name": "/nowhere/there"}, "has no tokenizer that can be loaded"),
        ({"do_predict": True}, "opinions has no test split. Add one"),
        ({"test_file": "test.csv"}, "test_file=test.csv has no effect without do_predict"),
        ({"samples_per_class": 4}, "has no effect without sampler=balanced"),
        (
            {"sampler": "balanced", "samples_per_class": 4},
            "16 texts, so 4 classes, and the training texts have 2. Use 8",
        ),
        ({"sampler": "balanced", "group_by_length": True}, "two orders of the texts"),
        ({"class_weights": "nowhere.json"}, "neither 'balanced' nor a file"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": '{"a": 1}'}, "polynomial with"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        ({"lr_scheduler_kwargs": "[1]"}, "is no JSON object"),
        ({"warmup_steps": 13}, "warmup_steps=13: the stage has 12 steps"),
        (
            {"strategy": "two_stage", "stage2_epochs": 0.5, "warmup_steps": 5},
            "stage 'exits': warmup_steps=5: the stage has 2 steps",
        ),
        (
            {
                "strategy": "two_stage",
                "lr_scheduler_type": "polynomial",
                "learning_rate": 2e-5,
                "lr_scheduler_kwargs": '{"lr_end": 1e-5}',
                "stage2_learning_rate": 5e-6,
            },
            "stage 'exits': lr_scheduler_type=polynomial",
        ),
        ({"early_stopping_patience": 2, "eval_steps": 0}, "early_stopping_patience needs eval"),
        ({"early_stopping_threshold": 0.1}, "has no effect without early_stopping_patience"),
        (
            {"early_stopping_patience": 1, "metric_for_best_model": "acuracy"},
            "metric_for_best_model='acuracy' is not reported",
        ),
        ({"greater_is_better": True}, "load_best_model_at_end too (or early_stopping_patience)"),
        ({"hub_model_id": "me/model"}, "has no effect without push_to_hub"),
        *([] if torch.cuda.is_available() else [({"tf32": True}, "no GPU with TF32")]),
    ],
    ids=str,
)
def test_refused_before_training(options, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        run(options, **changes)
    assert message in str(error.value)
    assert not Path(options["output_dir"], "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "has_effect"),
    [
        ({"load_best_model_at_end": True, "save_steps": None}, True),
        ({"load_best_model_at_end": True, "save_steps": None, "num_train_epochs": 1}, False),
        ({"load_best_model_at_end": True, "eval_steps": 12, "save_steps": 12}, False),
        ({"early_stopping_patience": 1, "eval_steps": 12}, False),
        ({"early_stopping_patience": 1, "save_steps": 12}, True),
    ],
    ids=str,
)
def test_a_choice_without_a_second_evaluation_is_warned_of(
    options, changes: dict[str, Any], has_effect: bool, caplog: pytest.LogCaptureFixture
) -> None:
    build_run(TrainingConfig.create(**{**options, **changes}))
    assert ("has no effect: the first evaluation" not in caplog.text) == has_effect


def test_a_resumed_run_says_what_it_cannot_compare(options, caplog) -> None:
    options |= {"save_steps": 4, "eval_steps": 4, "save_total_limit": None}
    run(options)
    run(options, resume_from_checkpoint="checkpoint-4", load_best_model_at_end=True)
    assert "steps until 4 are not compared, because the run was started without it" in caplog.text


def test_an_encoder_without_checkpoints_is_refused(options, monkeypatch) -> None:
    from transformers import BertModel

    monkeypatch.setattr(BertModel, "supports_gradient_checkpointing", False)
    with pytest.raises(ValueError, match="transformers has none for bert encoders"):
        run(options, gradient_checkpointing=True)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_is_the_one_asked_for(options, attention: str) -> None:
    parts = build_run(TrainingConfig.create(**options, attn_implementation=attention))
    assert parts.model.backbone.config._attn_implementation == attention


def test_class_weights_and_smoothing_are_in_the_loss(options, tmp_path: Path) -> None:
    """The logged loss is that of the definitions, however the texts are divided."""
    file = tmp_path / "weights.yaml"
    file.write_text("negative: 1\npositive: 3\n")
    changes = {"class_weights": str(file), "label_smoothing_factor": 0.2, "max_steps": 1}
    options |= {"dropout": 0.0, "objective": "ce", **changes}
    run(options)
    again = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    run(options, **again, output_dir=str(tmp_path / "parts"))
    (one,), (other,) = records(options["output_dir"], "train"), records(tmp_path / "parts", "train")
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
    parts = build_run(TrainingConfig.create(**{**options, "output_dir": str(tmp_path / "new")}))
    assert parts.class_weights == pytest.approx([0.5, 1.5])
    rows = next(iter(batches(parts)))
    from fusedacl.engine.data.batching import collate

    batch = collate(parts.train_split, rows, parts.tokenizer.pad_token_id)
    labels = batch.pop("labels")
    log_probabilities = parts.model.eval()(**batch).logits.log_softmax(dim=-1)
    weight = torch.tensor(parts.class_weights)
    truth = torch.nn.functional.one_hot(labels, 2)
    spread = 0.8 * truth + 0.1  # 0.2 over two classes
    expected = -(spread * weight * log_probabilities).sum(dim=1).mean()
    assert one["loss"] == pytest.approx(expected.item(), rel=1e-5)


def batches(parts: Any) -> list[Any]:
    from fusedacl.engine.data.batching import epoch_batches

    lengths, size = parts.train_split.lengths, parts.plan.batch_size
    return epoch_batches(lengths, size, seed=42, epoch=0, balanced=parts.balanced)


def test_balanced_batches_of_a_run(options, tiny_data: Path, tmp_path: Path, caplog) -> None:
    rows = opinions(tiny_data, "train", 64)
    rows = [row for index, row in enumerate(rows) if row["label"] == LABELS[0] or index < 24]
    write_jsonl(tmp_path / "data" / "opinions" / "train.jsonl", rows)
    options |= {"data_dir": str(tmp_path / "data"), "sampler": "balanced"}
    options |= {"per_device_train_batch_size": 4, "samples_per_class": 2}
    with caplog.at_level(logging.INFO, logger="fusedacl"):
        parts = build_run(TrainingConfig.create(**options))
    message = "sampler=balanced: 6 of 11 contrastive batches of an epoch have 2 classes x 2 texts"
    assert message in caplog.text
    labels = parts.train_split.labels.numpy()
    counts = [sorted(labels[rows].tolist()) for rows in batches(parts)]
    assert counts.count([0, 0, 1, 1]) == 6  # the 12 texts of the rarer class, two by two
    assert run(options, num_train_epochs=1)["num_steps"] == 11


def test_mostly_single_texts_are_warned_of(options, tmp_path: Path, caplog) -> None:
    rows = [{"sentence": f"a red dog {i}", "label": f"class {i % 16}"} for i in range(64)]
    write_jsonl(tmp_path / "data" / "many" / "train.jsonl", rows)
    options |= {"data_dir": str(tmp_path / "data"), "task_name": "many"}
    options |= {"per_device_train_batch_size": 4, "objective": "scl"}
    warning = r"\d+ of 64 training texts \(\d+%\) have no other text of their class"
    build_run(TrainingConfig.create(**options))
    assert re.search(warning, caplog.text)
    caplog.clear()
    build_run(TrainingConfig.create(**options, sampler="balanced"))
    assert not re.search(warning, caplog.text)


def test_a_stage_ends_early_and_the_next_one_begins(options, tmp_path: Path) -> None:
    never_better = {"early_stopping_patience": 1, "early_stopping_threshold": 1e9}
    options |= {"strategy": "two_stage", "eval_steps": 3, "save_steps": 3, **never_better}
    results = run(options, save_total_limit=None)
    # Evaluations after 3 and 6 steps of each stage of 12.
    assert results["num_steps"] == 12
    assert results["stopped_early"] == {"single": 6, "exits": 12}
    found = records(options["output_dir"], "validation")
    assert sorted({record["step"] for record in found}) == [3, 6, 9, 12]
    whole = Path(options["output_dir"])
    for step in (3, 6, 9, 12):
        partly = tmp_path / f"from {step}"
        options["output_dir"] = str(partly)
        _run_until(options, step)
        again = run(options, resume_from_checkpoint="latest")
        assert again["stopped_early"] == results["stopped_early"]
        assert records(partly) == records(whole)
        assert all(torch.equal(weights(partly)[n], value) for n, value in weights(whole).items())


class _Stop(Exception):
    pass


def _run_until(options: dict[str, Any], step: int) -> None:
    """Run, and break off after the checkpoint of a step."""

    def stop(self: trainer.Trainer, **evaluated: bool) -> Path:
        saved = save(self, **evaluated)
        if self.step == step:
            raise _Stop
        return saved

    save = trainer.Trainer._save_checkpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "_save_checkpoint", stop)
        with pytest.raises(_Stop):
            run(options)


@pytest.mark.parametrize(
    "changes",
    [
        {"sampler": "balanced", "class_weights": "balanced", "label_smoothing_factor": 0.1},
        {"lr_scheduler_type": "cosine", "warmup_steps": 3, "fp16": True, "adam_beta2": 0.98},
        {"freeze_layers": 0, "gradient_checkpointing": True, "strategy": "alternating"},
    ],
    ids=str,
)
def test_resumes_bitwise(options, changes: dict[str, Any], tmp_path: Path) -> None:
    options |= {"save_steps": 5, "eval_steps": 4, **changes}
    run(options)
    whole = Path(options["output_dir"])
    options["output_dir"] = str(tmp_path / "parts")
    _run_until(options, 5)
    run(options, resume_from_checkpoint="latest")
    assert records(tmp_path / "parts") == records(whole)
    found = weights(tmp_path / "parts")
    assert all(torch.equal(found[name], value) for name, value in weights(whole).items())


def test_other_class_weights_are_not_resumed_with(options, tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "weights.json"
    file.write_text('{"negative": 1, "positive": 3}')
    options |= {"class_weights": str(file), "save_steps": 2}
    _run_until(options, 2)
    file.write_text('{"negative": 1, "positive": 2}')
    with pytest.raises(ValueError, match="class_weights: .* now, .* when .*checkpoint-2"):
        run(options, resume_from_checkpoint="latest")


@pytest.mark.parametrize("labelled", [True, False])
def test_the_test_split_is_predicted(
    options, labelled: bool, tiny_data: Path, tmp_path: Path
) -> None:
    rows = opinions(tiny_data, "validation", 12)
    if not labelled:
        rows = [{**row, "label": -1} for row in rows]
    train = opinions(tiny_data, "train", 64)
    for name, lines in {"train": train, "validation": train[:8], "test": rows}.items():
        options[f"{name}_file"] = write_jsonl(tmp_path / f"{name}.jsonl", lines)
    options |= {"task_name": None, "data_dir": None, "num_train_epochs": 12}
    results = run(options, do_predict=True, max_predict_samples=10)
    (found,) = results["predictions"].values()
    with Path(options["output_dir"], found["file"]).open() as file:
        answers = [row["label"] for row in csv.DictReader(file)]
    assert len(answers) == 10 and set(answers) <= set(LABELS)
    if labelled:
        right = [answer == row["label"] for answer, row in zip(answers, rows, strict=False)]
        assert found["metrics"][2]["accuracy"] == pytest.approx(sum(right) / 10)
        assert found["metrics"][2]["accuracy"] > 0.75
    else:
        assert found["metrics"] is None
    assert set(results["metrics"]) == {"validation"}


def test_a_tokenizer_of_ones_own(
    options, tiny_bert: Path, tiny_roberta: Path, tmp_path: Path
) -> None:
    parts = build_run(TrainingConfig.create(**options, tokenizer_name=str(tiny_bert)))
    assert parts.tokenizer.name_or_path == str(tiny_bert)
    with pytest.raises(ValueError, match="its tokenizer has .* more"):
        run(options, tokenizer_name=str(tiny_roberta))


def test_a_revision_of_the_hub(
    options, tiny_bert: Path, deep_bert: Path, tmp_path: Path, monkeypatch
) -> None:
    """From the cache of the hub, in which a model has two revisions."""
    repository = tmp_path / "models--me--tiny"
    for name, commit, encoder in (("main", "a" * 40, tiny_bert), ("v2", "b" * 40, deep_bert)):
        shutil.copytree(encoder, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options |= {"model_name_or_path": "me/tiny"}
    for revision, num_layers in ((None, 2), ("main", 2), ("v2", 4)):
        parts = build_run(TrainingConfig.create(**options, model_revision=revision))
        assert parts.model.config.backbone_config.num_hidden_layers == num_layers
    with pytest.raises(ValueError, match="model_name_or_path='me/tiny' cannot be loaded"):
        build_run(TrainingConfig.create(**options, model_revision="v3"))


class Hub:
    """A stand-in for the client of the hub, which keeps what it gets."""

    opened: dict[str, Any]
    given: dict[str, list[str]]
    is_down = False

    def create_repo(self, name: str, **options: Any) -> Any:
        if self.is_down:
            raise ConnectionError("no network")
        type(self).opened[name] = options
        return type("RepoUrl", (), {"repo_id": f"me/{name}"})()

    def upload_folder(self, *, repo_id: str, allow_patterns: list[str], **options: Any) -> None:
        if self.is_down:
            raise ConnectionError("no network")
        directory = Path(options["folder_path"])
        assert all((directory / name).exists() for name in allow_patterns)
        type(self).given[repo_id] = allow_patterns


@pytest.fixture
def stand_in(monkeypatch) -> type[Hub]:
    monkeypatch.setattr(hub, "HfApi", Hub)
    Hub.opened, Hub.given, Hub.is_down = {}, {}, False
    return Hub


def test_the_final_model_is_pushed(options, stand_in: type[Hub]) -> None:
    options |= {"push_to_hub": True, "num_train_epochs": 1, "save_steps": 2}
    run(options, hub_model_id="mine", hub_private_repo=True)
    assert stand_in.opened == {"mine": {"private": True, "exist_ok": True}}
    files = set(stand_in.given["me/mine"])
    assert {"model.safetensors", "config.json", "README.md", "tokenizer.json"} <= files
    assert not any(name.startswith(("checkpoint", "metrics")) for name in files)


def test_a_hub_out_of_reach(options, stand_in: type[Hub], monkeypatch) -> None:
    options |= {"push_to_hub": True, "num_train_epochs": 1}
    stand_in.is_down = True
    with pytest.raises(ValueError, match="push_to_hub: the repository 'run' cannot be opened: no"):
        run(options)
    assert not Path(options["output_dir"]).exists()
    stand_in.is_down = False
    at_step(monkeypatch, 1, lambda trainer: setattr(stand_in, "is_down", True))
    with pytest.raises(OSError, match="did not take the model: no network. It is in .*hf upload"):
        run(options)
    assert json.loads(Path(options["output_dir"], "results.json").read_text())["num_steps"] == 4
