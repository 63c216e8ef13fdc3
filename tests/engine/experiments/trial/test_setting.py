"""The setting of a trial: what is refused before any run, and the size of the runs."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fusedacl.engine.cli.main import main
from fusedacl.engine.experiments.recipe import plan_cells
from fusedacl.engine.experiments.report_plan import plan_report
from fusedacl.engine.experiments.trial.setting import Setting, read_setting


def rows_of(number: int) -> list[dict[str, str]]:
    return [{"sentence": f"dog {row}", "label": ("good", "bad")[row % 2]} for row in range(number)]


def write_jsonl(file: Path, rows: list[dict[str, str]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def large(given: dict[str, Any] | None = None) -> Setting:
    """A set of two classes with 3,000 and 500 texts."""
    options = {"task_name": "mine", "model_name_or_path": "bert", **(given or {})}
    return Setting(options, frozenset(given or {}), 3500, 200, (3000, 500), 0.5, "0")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (rows_of(10), "8 texts to train on and 2 to evaluate on are too few: a trial"),
        ([{"sentence": "a dog", "label": "good"}] * 60, "at least two classes"),
        (
            [*rows_of(59), {"sentence": "a", "label": "odd"}],
            "has 1 texts of class 'odd': too few to hold 20 % of each class out, as the data have "
            "no labelled validation split. Give one (--validation_file, beside --train_file), or "
            "take the class out",
        ),
    ],
)
def test_unsuitable_data_are_refused_before_any_run(
    rows: list[dict[str, str]],
    message: str,
    tiny_bert: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write_jsonl(tmp_path / "mine.jsonl", rows)
    arguments = ["--train_file", str(file), "--model_name_or_path", str(tiny_bert)]
    assert main(["try", *arguments, "--output_dir", str(tmp_path / "try")]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and not shown.out and not (tmp_path / "try").exists()
    assert "validation_split_percentage" not in shown.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "acl"}, "objective=acl: a trial sets this itself"),
        ({"seed": 3}, "seed=3: a trial sets this itself"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end=True: a trial sets this"),
        ({"learning_rate": -1}, "learning_rate=-1.0 is out of range"),
        ({"fp16": True, "bf16": True}, "fp16 and bf16 are both on"),
        # `opinions` names ten steps, so that there is no other size.
        ({"warmup_steps": 11}, "warmup_steps=11: the stage has 10 steps"),
        ({"memory_size": 8, "memory_warmup_steps": 10}, "memory_warmup_steps=10: the memory would"),
        ({"lr_scheduler_kwargs": '{"cycles": 2}'}, "lr_scheduler_type=linear with"),
        ({"sampler": "balanced", "samples_per_class": 5}, "samples_per_class=5: a contrastive"),
    ],
)
def test_unsuitable_options_are_refused(
    changes: dict[str, Any], message: str, opinions: Any
) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        opinions(**changes)


def test_mistakes_of_the_own_options(capsys: pytest.CaptureFixture[str]) -> None:
    for flag, message in (
        (["--min_gain", "-1"], "min_gain=-1: points"),
        (["--mintes", "3"], "Unknown flag '--mintes'"),
    ):
        assert main(["try", "--task_name", "quickstart", *flag]) == 2
        assert message in capsys.readouterr().err


def test_without_a_validation_split_texts_are_held_out(tiny_bert: Path, tmp_path: Path) -> None:
    rows = rows_of(200)
    options = {"model_name_or_path": str(tiny_bert)}
    file = write_jsonl(tmp_path / "mine.jsonl", rows)
    setting = read_setting({**options, "train_file": str(file)})
    assert (setting.num_train, setting.num_evaluated, setting.task) == (160, 40, "mine")
    assert setting.class_counts == (80, 80) and setting.constant_score == 0.5
    # A test split is not for choosing a method.
    folder = tmp_path / "data" / "mine"
    folder.mkdir(parents=True)
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(folder / "test.jsonl", rows[:30])
    options |= {"task_name": "mine", "data_dir": str(tmp_path / "data")}
    assert read_setting(options).num_evaluated == 40


def test_an_unlabelled_validation_file_is_replaced_by_held_out_texts(
    tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = write_jsonl(tmp_path / "mine.jsonl", rows_of(200))
    unlabelled = [{"sentence": row["sentence"], "label": "-1"} for row in rows_of(40)]
    file = str(write_jsonl(tmp_path / "dev.jsonl", unlabelled))
    options = {"model_name_or_path": str(tiny_bert), "train_file": str(train)}
    with caplog.at_level(logging.INFO, logger="fusedacl"):
        setting = read_setting({**options, "validation_file": file})
    assert f"validation_file={file!r} is unlabelled: 20 % of" in caplog.text
    assert (setting.num_train, setting.num_evaluated) == (160, 40)
    # The runs take these options.
    assert plan_cells(setting.pilot()) and plan_cells(setting.recipe(setting.size(None), 1))


def test_several_labels_per_text_and_the_embedded_data(emotion_files: dict[str, str]) -> None:
    several = read_setting({**emotion_files, "model_name_or_path": "bert"})
    # No text belongs to one class, so that all of them are taken.
    assert several.class_counts is None and several.constant_score is None
    assert [size.per_class for size in several.sizes()] == [None]
    # Neither a path nor an encoder has to be named.
    embedded = read_setting({"task_name": "quickstart"})
    assert (embedded.task, embedded.num_train, embedded.num_evaluated) == ("quickstart", 2000, 400)
    assert plan_cells(embedded.pilot())


def test_short_runs_get_more_epochs_unless_they_are_given() -> None:
    setting = large()
    whole, few = setting.size(None), setting.size(5)
    # 110 batches of 32 texts; with one batch, 100 epochs.
    assert (whole.num_texts, whole.num_steps, whole.num_epochs) == (3500, 330, 3.0)
    assert (few.num_texts, few.num_steps, few.num_epochs) == (10, 100, 100.0)
    assert [size.per_class for size in setting.sizes()] == [
        None, 1000, 500, 200, 100, 50, 20, 10, 5,
    ]  # fmt: skip
    assert setting.size(1000).num_texts == 1500
    assert large({"num_train_epochs": 2.0}).size(5).num_steps == 2
    assert [size.num_steps for size in large({"max_steps": 7}).sizes()] == [7]
    accumulating = large({"gradient_accumulation_steps": 4})
    assert accumulating.size(None).num_steps == 112 and accumulating.texts_of_step == 128


def test_the_recipe_gives_each_method_the_options_that_it_takes() -> None:
    given = {"gate_scope": "head", "contrastive_batch_size": 32, "learning_rate": 1e-4}
    setting = large(given)
    recipe = setting.recipe(setting.size(50), num_draws=2)
    cells = plan_cells(recipe)
    assert len(plan_report(recipe).claims) == 2 and len(cells) == 6
    by_method = {cell.method: cell.options for cell in cells}
    assert "gate_scope" not in {**by_method["CE"], **by_method["CE+SCL"]}
    assert "contrastive_batch_size" not in by_method["CE"]
    assert by_method["ACL"]["gate_scope"] == "head"
    assert {cell.options["max_train_samples_per_class"] for cell in cells} == {50}
    json.dumps(recipe)
    # The pilot draws no more than its steps read.
    pilot = plan_cells(setting.pilot())
    assert {cell.options["max_steps"] for cell in pilot} == {8}
    assert {cell.options["max_train_samples_per_class"] for cell in pilot} == {128}


def test_sizes_with_fewer_steps_than_a_warm_up_are_left_out() -> None:
    def limits(**given: Any) -> list[int | None]:
        return [size.per_class for size in large(given).sizes()]

    # 220, 94, 64 and 26 steps.
    assert limits(num_train_epochs=2.0, warmup_steps=64) == [None, 1000, 500]
    assert limits(num_train_epochs=2.0, warmup_steps=64, lr_scheduler_type="constant")[-1] == 5
    assert limits(num_train_epochs=2.0, memory_size=8, memory_warmup_steps=64) == [None, 1000]
    # The cross-entropy of a trial has no contrastive batch, but the other methods do.
    balanced = {"sampler": "balanced", "samples_per_class": 16}
    assert limits(**balanced)[-1] == 20
    with pytest.raises(ValueError, match="warmup_steps=400: the stage has 330 steps"):
        limits(warmup_steps=400)


def test_the_pilot_runs_whatever_the_draws_need() -> None:
    given = {
        "warmup_steps": 50, "lr_scheduler_type": "cosine_with_restarts",
        "lr_scheduler_kwargs": '{"num_cycles": 3}', "memory_size": 8, "memory_warmup_steps": 20,
    }  # fmt: skip
    assert large(given).pilot()["defaults"].keys().isdisjoint(given.keys() - {"memory_size"})
    # 8 steps of 32 texts are 4 of each class, with which no batch has 8 of one.
    banking = {"task_name": "mine", "model_name_or_path": "bert", "sampler": "balanced"}
    for chosen, expected in ((8, 8), (None, 4)):
        options = {**banking, "samples_per_class": chosen} if chosen else banking
        setting = Setting(options, frozenset(), 77 * 100, 200, (100,) * 77, 0.5, "0")
        assert setting.pilot()["defaults"]["max_train_samples_per_class"] == expected
    # By default 62 texts are 31 of each of two classes.
    odd = Setting({**banking, "per_device_train_batch_size": 62}, frozenset(), 2000, 200,
                  (100,) * 20, 0.5, "0")  # fmt: skip
    assert odd.pilot()["defaults"]["max_train_samples_per_class"] == 31


def test_the_pilot_is_evaluated_on_some_of_the_texts() -> None:
    for evaluated, more, limit, left in (
        (200, (), 200, 0), (9815, (9832,), 500, 9315 + 9332), (300, (900,), 300, 600),
    ):  # fmt: skip
        setting = replace(large(), num_evaluated=evaluated, more_evaluated=more)
        assert setting.pilot()["defaults"]["max_eval_samples"] == limit
        assert setting.texts_left == left
