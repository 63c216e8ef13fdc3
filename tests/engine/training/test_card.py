"""The card: what it says of a run and of early exit, and that the hub can read it."""

import copy
from pathlib import Path
from typing import Any

import pytest
from fusedacl.engine import TrainingConfig
from fusedacl.engine.inference.calibration.card import write_early_exit
from fusedacl.engine.training.card import model_card
from huggingface_hub import ModelCard

RESULTS: dict[str, Any] = {
    "data": "opinions",
    "metrics": {
        "validation": {
            1: {"accuracy": 0.75, "f1": 0.5, "loss": 0.625},
            2: {"accuracy": 0.8125, "f1": 0.625, "loss": 0.5},
        }
    },
    "num_steps": 12,
    "num_processes": 2,
    "command": "fusedacl train --task_name opinions --exit_layers 1,2",
    "versions": {"python": "3.11.0", "torch": "2.6.0"},
}
STUDY: dict[str, Any] = {
    "metric": "accuracy",
    "exit_layers": [1, 2],
    "machine": "Some CPU, 2 threads",
    "versions": {"torch": "2.6.0"},
    "command": "fusedacl exits --policy entropy",
    "policies": {
        "entropy": {
            "name": "entropy",
            "area_under_curve": 0.78125,
            "parameters": {"threshold": 0.25},
            "calibration": {
                "data": "opinions, validation",
                "num_samples": 24,
                "dtype": "bfloat16",
                "max_seq_length": 64,
                "full_score": 0.8125,
                "score": 0.8,
                "mean_layer": 1.5,
                "flops_share": 0.75,
                "target": {"max_quality_loss": 0.02},
                "cross_fitted": {
                    "score": 0.7875,
                    "mean_layer": 1.4,
                    "flops_share": 0.7,
                    "num_folds": 2,
                },
            },
        }
    },
}
SPEEDS = [
    {"batch_size": 1, "num_texts": 24, "repeats": 3, "speedup": 1.5},
    {"batch_size": 32, "num_texts": 24, "repeats": 3, "speedup": 1.25},
]


def config_of(**options: Any) -> TrainingConfig:
    values = {"task_name": "quickstart", "output_dir": "out", **options}
    return TrainingConfig.create(**values).resolved()


def test_several_exits_are_a_table() -> None:
    config = config_of(
        strategy="two_stage", stage2_learning_rate=1e-3, distill_weight=0.5, bf16=True
    )
    card = model_card(config, "some/encoder", RESULTS)
    assert "| split | exit at layer | accuracy | f1 | loss |\n| --- |" in card
    assert "| validation | 2 | 0.8125 | 0.6250 | 0.5000 |" in card
    assert "- Strategy: two_stage (backbone and last exit, then the other exits" in card
    assert "peak learning rate 2e-05 (second stage 0.001), 3 epochs, 64 texts a step, bf" in card
    assert "Distilled from the last exit: weight 0.5" in card
    assert "fusedacl train --task_name opinions" in card and "torch 2.6.0" in card


def test_one_exit_is_a_line() -> None:
    results = {**RESULTS, "metrics": {"validation": {2: RESULTS["metrics"]["validation"][2]}}}
    card = model_card(config_of(), "some/encoder", results)
    assert "- validation, exit at layer 2: accuracy 0.8125, f1 0.6250, loss 0.5000" in card
    assert "| split |" not in card
    card = model_card(config_of(), "some/encoder", {**RESULTS, "metrics": {}})
    assert "There was no labelled split to evaluate on." in card


def test_the_first_stages_model_is_named() -> None:
    config = config_of(strategy="two_stage", stage1_model="runs/first", max_steps=7)
    card = model_card(config, "runs/first", RESULTS)
    assert "- First stage: taken from runs/first" in card
    assert "epochs" not in card


@pytest.mark.parametrize("base", ["some/encoder", "a: name #1 'with' \"marks\"", "- [x]"])
def test_the_hub_reads_the_metadata(tmp_path: Path, base: str) -> None:
    path = tmp_path / "README.md"
    path.write_text(model_card(config_of(), base, RESULTS), encoding="utf-8")
    for _ in range(2):
        card = ModelCard.load(path)
        assert card.data.base_model == base
        assert card.data.metrics == ["accuracy", "f1"]
        assert card.data.library_name == "fusedacl"
        assert card.data.pipeline_tag == "text-classification"
        write_early_exit(path, STUDY, "entropy")


def test_the_hub_knows_no_local_directory(tmp_path: Path) -> None:
    card = model_card(config_of(), str(tmp_path), RESULTS)
    assert ModelCard(card).data.base_model is None
    assert f"# {tmp_path.name} fine-tuned on opinions" in card
    assert "lambda 0.02, tau 0.5, mean over anchors" in card


def test_early_exit_is_replaced_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    before = model_card(config_of(), "some/encoder", RESULTS)
    path.write_text(before + "\nOwn words.\n", encoding="utf-8")
    write_early_exit(path, STUDY, "entropy")
    first = path.read_text()
    assert first.startswith(before) and "Own words." in first
    assert "|  | setting | accuracy | accuracy, cross-fitted | mean layer | FLOPs | area" in first
    assert "| full model |  | 0.8125 | 0.8125 | 2.00 | 100% |  |" in first
    assert "| `entropy` | threshold 0.25 | 0.8000 | 0.7875 | 1.50 | 75% | 0.7812 |" in first
    assert "max_quality_loss 0.02 on 24 texts (opinions, validation) in bfloat16, at" in first
    assert "fusedacl exits --policy entropy" in first and "speed" not in first
    write_early_exit(path, STUDY, "entropy")
    assert path.read_text() == first
    # Text below the section stays, and measured times are added to the section.
    path.write_text(first + "\nMore words.\n", encoding="utf-8")
    timed = copy.deepcopy(STUDY)
    timed["policies"]["entropy"]["measured"] = SPEEDS
    write_early_exit(path, timed, "entropy")
    second = path.read_text()
    assert second.count("## Early exit") == 1 and second.endswith("\nMore words.\n")
    assert "| 75% | 0.7812 | 1.50x | 1.25x |" in second and "speed, batch 32 |" in second
    assert "on Some CPU, 2 threads." in second


def test_what_was_not_cross_fitted_has_no_column(tmp_path: Path) -> None:
    study = copy.deepcopy(STUDY)
    study["policies"]["entropy"]["calibration"]["cross_fitted"] = None
    write_early_exit(tmp_path / "README.md", study, "entropy")
    card = ModelCard.load(tmp_path / "README.md")
    # A model without a card, such as a checkpoint, gets one of this alone.
    assert card.data.library_name == "fusedacl"
    assert f"# {tmp_path.name}" in card.text
    assert "| `entropy` | threshold 0.25 | 0.8000 | 1.50 | 75% | 0.7812 |" in card.text
    assert "cross-fitted" not in card.text.lower()
