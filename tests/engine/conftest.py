"""Options of runs, a set with several labels, and a sweep without training: its files."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from text_sets.emotions import DEV, TRAIN, write_table
from tiny_runs import run


@pytest.fixture
def options(tiny_options: dict[str, Any]) -> dict[str, Any]:
    """Options of a run of three epochs of four steps that are all logged."""
    steps = {"num_train_epochs": 3, "logging_steps": 1, "save_steps": 0}
    return {**tiny_options, **steps, "per_device_train_batch_size": 16, "learning_rate": 5e-3}


TASKS = {"mrpc": ("f1", 0.80), "rte": ("accuracy", 0.58), "cola": ("matthews_correlation", 0.30)}
SECOND = {"strategy": "two_stage", "objective": "ce"}
GRID = {"strategy": "joint", "objective": "acl", "aux_weight": [0.005, 0.02, 0.1]}
# Method -> its options, and its gain at the first and at the last layer.
METHODS: dict[str, tuple[dict[str, Any], float, float]] = {
    "CE": ({"objective": "ce"}, 0.0, 0.0),
    "ACL backbone": ({"objective": "acl"}, 0.0, 0.01),
    "JT": ({"strategy": "joint", "objective": "ce"}, -0.02, -0.03),
    "2ST-linear": ({"stage1": "CE", **SECOND, "exit_head": "linear"}, -0.06, 0.0),
    "2ST-MHA": ({"stage1": "CE", **SECOND}, -0.01, 0.0),
    "ACL": ({"stage1": "ACL backbone", "strategy": "two_stage", "objective": "acl"}, 0.01, 0.01),
    "ACL sweep": (GRID, 0.0, 0.0),
}
REPORT = {
    "layer_scores": ["JT", "2ST-linear", "2ST-MHA", "ACL"],
    "ablation": {"methods": {"ACL": "ACL", "no ACL": "2ST-MHA", "linear exits": "2ST-linear"}},
    "grid": [{"option": "aux_weight", "methods": {"ACL": "ACL sweep"}}],
    "full_model": {
        "methods": {
            "CE": "CE",
            "ACL": "ACL backbone",
            "ACL-CL, exit 3": {"method": "ACL", "layer": 3},
        }
    },
}


def write_cell(directory: Path, task: str, method: str, seed: int, grid: dict[str, Any]) -> None:
    """results.json and metrics.jsonl of one run."""
    options, first, last = METHODS[method]
    draw = random.Random(f"{task} {method} {seed} {grid}")
    metric, level = TASKS[task]
    layers = range(1, 7) if "strategy" in options else [6]
    scores = {}
    for layer in layers:
        depth = (layer - 1) / 5
        score = level + 0.1 * depth**0.7 + first * (1 - depth) + last * depth
        score -= 0.05 * abs(math.log10(grid.get("aux_weight", 0.02) / 0.02))
        scores[str(layer)] = {metric: score + draw.gauss(0, 0.006), "loss": 0.5}
    directory.mkdir(parents=True)
    gated = options["objective"] == "acl"
    groups = [f"exit {layer}" for layer in layers[:-1]] if "strategy" in options else ["model"]
    gate = [
        {
            "epoch": epoch, "group": group, "steps": 40, "dropped_share": 0.1 / epoch,
            "angle_p10": 55.0, "angle_median": 70.0 + epoch, "angle_p90": 91.0,
        }
        for epoch in (1, 2)
        for group in groups
    ]  # fmt: skip
    results = {
        "data": task,
        "metrics": {"validation": scores},
        "gate": gate if gated else [],
        "train_seconds": 60.0,
        "command": f"fusedacl train --task_name {task} --seed {seed}",
        "options": {
            "strategy": "single", "exit_head": "mha", "gate": "angle" if gated else "none",
            "cross_layer": method == "ACL", "distill_weight": 0.0, "max_angle": 90.0,
            "model_name_or_path": "bert-base-uncased", "seed": seed, **options, **grid,
        },
        "versions": {"fusedacl": "0.1.0", "torch": "2.6.0"},
    }  # fmt: skip
    results["options"].pop("stage1", None)
    (directory / "results.json").write_text(json.dumps(results))
    lines = []
    for step in range(1, 81):
        record: dict[str, Any] = {"step": step, "epoch": step / 40, "split": "train"}
        for number, group in enumerate(groups if gated else ()):
            name = "angle_degrees" if group == "model" else f"angle_degrees {group}"
            record[name] = draw.gauss(74 + 2 * number, 9)
        lines.append(json.dumps(record) + "\n")
    (directory / "metrics.jsonl").write_text("".join(lines))


def write_sweep(
    directory: Path,
    statuses: dict[tuple[str, str, int], str] | None = None,
    report: dict[str, Any] | None = REPORT,
    methods: tuple[str, ...] = tuple(METHODS),
    tasks: tuple[str, ...] = tuple(TASKS),
    seeds: tuple[int, ...] = (1, 2, 3),
) -> Path:
    """A sweep; `statuses`: (task, method, seed) -> what it is instead of done."""
    recipe: dict[str, Any] = {
        "seeds": list(seeds),
        "tasks": {task: {} for task in tasks},
        "methods": {name: METHODS[name][0] for name in methods},
    }
    if report is not None:
        recipe["report"] = report
    cells = []
    for task in tasks:
        for method in methods:
            values = METHODS[method][0].get("aux_weight")
            for grid in [{"aux_weight": v} for v in values] if values else [{}]:
                for seed in seeds:
                    status = (statuses or {}).get((task, method, seed), "done")
                    place = f"cells/{task}/{method}/{list(grid.values())}/seed-{seed}"
                    if status == "done":
                        write_cell(directory / place, task, method, seed, grid)
                    cells.append(
                        {
                            "task": task, "method": method, "seed": seed, "grid": grid,
                            "directory": place, "status": status, "seconds": None,
                            "error": "exit status 1: no memory" if status == "failed" else None,
                        }
                    )  # fmt: skip
    directory.mkdir(exist_ok=True)
    values = {"schema": 1, "recipe": recipe, "cells": cells}
    (directory / "sweep.json").write_text(json.dumps(values))
    return directory


@pytest.fixture(scope="session")
def unfinished_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks, two seeds; of cola one run of ACL has failed and 2ST-linear has not begun."""
    statuses = {
        ("cola", "ACL", 2): "failed",
        ("cola", "2ST-linear", 1): "waiting",
        ("cola", "2ST-linear", 2): "waiting",
    }
    directory = tmp_path_factory.mktemp("sweeps") / "unfinished"
    return write_sweep(directory, statuses, tasks=("mrpc", "cola"), seeds=(1, 2))


@pytest.fixture(scope="session")
def make_sweep() -> Callable[..., Path]:
    """`write_sweep`."""
    return write_sweep


@pytest.fixture(scope="session")
def emotion_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Options that name the files of `text_sets.emotions`, with a list of labels per text."""
    directory = tmp_path_factory.mktemp("emotions")
    return {
        "train_file": write_table(directory / "train.jsonl", TRAIN),
        "validation_file": write_table(directory / "dev.jsonl", DEV),
    }


@pytest.fixture(scope="module")
def emotion_model(
    tiny_bert: Path, emotion_files: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model of two exits, half trained, so that its exits disagree."""
    directory = tmp_path_factory.mktemp("emotion_model") / "run"
    run(
        {
            **emotion_files,
            "model_name_or_path": str(tiny_bert),
            "output_dir": str(directory),
            "strategy": "joint",
            "max_seq_length": 16,
            "per_device_train_batch_size": 16,
            "learning_rate": 2e-3,
            "max_steps": 40,
            "save_steps": 0,
            "disable_tqdm": True,
        }
    )
    return directory
