"""Whole runs of two processes: the numbers of one, stopping and going on, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed")

from combination_cases import trained_model
from fusedacl.engine import TrainingConfig, train
from fusedacl.engine.config.fields import write_yaml
from fusedacl.engine.runtime import processes
from fusedacl.engine.training.builder import build_run
from fusedacl.engine.training.storage.checkpoint import load_state
from rank_pool import Ranks
from tiny_runs import records
from training_cases import (
    deepspeed_file,
    linear_is_torchs,
    model_of,
    pushed,
    refused,
    refused_in,
    stopped,
    trained,
)


@pytest.fixture
def options(tiny_options: dict[str, Any]) -> dict[str, Any]:
    return {
        **tiny_options,
        "learning_rate": 1e-3, "dropout": 0.0, "num_train_epochs": 2,
        "per_device_train_batch_size": 8, "aux_weight": 0.3, "contrastive_reduction": "sum",
        # No angle is near it, so that rounding decides nothing.
        "max_angle": 180,
        "logging_steps": 1, "save_steps": 0, "device": "cpu",
    }  # fmt: skip


CASES: dict[str, dict[str, Any]] = {
    "acl": {},
    # 33 texts: the last batch has one for two processes, which see texts of other lengths.
    "stand-in": {"max_train_samples": 33, "denominator": "others"},
    "ZeRO 3, two stages": {"stage": 3, "strategy": "two_stage"},
    "joint, accumulation, ZeRO 1": {
        "stage": 1, "strategy": "joint", "gradient_accumulation_steps": 2,
    },
    "large batches": {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4,
        "contrastive_batch_size": 8, "max_train_samples": 60,
    },
    "ZeRO 3, memory, temperature": {
        "stage": 3, "memory_size": 12, "temperature_learning_rate": 0.05,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(case: str, options, two_ranks: Ranks, tmp_path: Path) -> None:
    settings = {**options, **CASES[case]}
    stage = settings.pop("stage", None)
    of_both = two_ranks.run(
        trained,
        {
            **settings, "negatives": "global", "output_dir": str(tmp_path / "two"),
            "deepspeed_config": deepspeed_file(tmp_path, stage),
        },
    )  # fmt: skip
    assert of_both[0] == of_both[1]
    # ZeRO 3 has one of its own, which rounds otherwise.
    assert two_ranks.run(linear_is_torchs) == [True, True]
    twice = {"per_device_train_batch_size": 2 * settings["per_device_train_batch_size"]}
    for name in ("contrastive_batch_size", "memory_size"):
        if name in settings:
            twice[name] = 2 * settings[name]
    of_one = train(TrainingConfig.create(**{**settings, **twice}))["metrics"]
    layers = of_one["validation"]
    assert of_both[0]["validation"].keys() == layers.keys()
    for layer, metrics in layers.items():
        assert of_both[0]["validation"][layer] == pytest.approx(metrics, rel=2e-3)
    pairs = list(zip(records(tmp_path / "two"), records(settings["output_dir"]), strict=True))
    assert len(pairs) > 5
    for ours, theirs in pairs:
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"samples_per_second", "metrics"}:
            # AdamW's first steps have the size of the learning rate whatever the gradient's, so
            # rounding spreads.
            tolerance = {"abs": 0.3} if name.startswith("angle") else {"rel": 2e-3}
            is_number = isinstance(theirs[name], float)
            expected = pytest.approx(theirs[name], **tolerance) if is_number else theirs[name]
            assert ours[name] == expected, name


def test_stops_at_one_step_and_goes_on(options, two_ranks: Ranks, tmp_path: Path) -> None:
    settings = {**options, "dropout": 0.2, "strategy": "two_stage"}
    whole = {**settings, "output_dir": str(tmp_path / "whole")}
    two_ranks.run(trained, whole)
    for step in (3, 11):
        # In either stage.
        parts = {**settings, "output_dir": str(tmp_path / f"parts{step}")}
        answers = two_ranks.run(stopped, parts, step)
        assert [code for code, _ in answers] == [143, 143]
        assert all(f"checkpoint-{step}" in words for _, words in answers)
        two_ranks.run(trained, {**parts, "resume_from_checkpoint": "latest"})
        assert model_of(tmp_path / f"parts{step}") == model_of(tmp_path / "whole")
        assert len(records(tmp_path / f"parts{step}")) == len(records(tmp_path / "whole"))


def test_own_memories_and_one_temperature(options, two_ranks: Ranks, tmp_path: Path) -> None:
    """Each process has a memory of its own, also after resuming; all learn one temperature."""
    settings = {
        **options, "max_train_samples": 33, "memory_size": 12, "temperature_learning_rate": 0.05,
        "num_train_epochs": 3,
    }  # fmt: skip
    whole, parts = (
        {**settings, "output_dir": str(tmp_path / name), "save_steps": 0}
        for name in ("whole", "parts")
    )
    (results, digest), (others, other_digest) = two_ranks.run(trained_model, whole)
    assert digest == other_digest
    assert results["temperature"] == others["temperature"] != 0.5
    answers = two_ranks.run(stopped, parts, 5)
    assert [code for code, _ in answers] == [143, 143]
    saved = [load_state(tmp_path / "parts" / "checkpoint-5", rank) for rank in (0, 1)]
    rows = [state["losses"]["memory"]["embeddings"] for state in saved]
    assert not rows[0].isclose(rows[1]).all(dim=1).any()
    resumed = two_ranks.run(trained_model, {**parts, "resume_from_checkpoint": "latest"})
    assert [found[1] for found in resumed] == [digest, digest]
    assert resumed[0][0]["temperature"] == results["temperature"]


def test_what_is_refused_is_refused_on_both(options, two_ranks: Ranks, tmp_path: Path) -> None:
    def message(of_rank_1: dict[str, Any] | None = None, **changes: Any) -> str:
        answers = two_ranks.run(refused, {**options, **changes}, of_rank_1 or {})
        assert answers[0] == answers[1]
        return answers[0]

    found = message({"learning_rate": 2e-3})
    assert "learning_rate: process 0 on" in found and "has 0.002" in found
    # One process finds its data gone: the others hear of it, and nobody waits.
    assert "no such directory" in message(data_dir=str(tmp_path / "nowhere"))
    file = deepspeed_file(tmp_path, zero_optimisation={"stage": 1})
    assert "'zero_optimization'" in message(deepspeed_config=file)
    file = deepspeed_file(tmp_path, train_micro_batch_size_per_gpu=5)
    assert "train_micro_batch_size_per_gpu" in message(deepspeed_config=file)
    assert "deepspeed_config=none.json: No such file" in message(deepspeed_config="none.json")
    assert not (tmp_path / "run").exists()


def test_files_that_differ_under_one_name(options, two_ranks: Ranks, tmp_path: Path) -> None:
    """As on two machines: each process reads what lies in its own working directory."""
    places = [tmp_path / name for name in "ab"]
    for place in places:
        shutil.copytree(options["data_dir"], place / "data")
        deepspeed_file(place, 1)
    options |= {"data_dir": "data", "deepspeed_config": "deepspeed.json"}

    def message() -> str:
        first, second = two_ranks.run(refused_in, options, [str(place) for place in places])
        assert first == second and "Copy the files of data_dir (or train_file), of deep" in first
        return str(first)

    deepspeed_file(places[1], 2)
    assert "deepspeed_config: process 0 on" in message()
    deepspeed_file(places[1], 1)
    file = places[1] / "data" / "opinions" / "validation.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    found = message()
    assert "rows of validation: process 0 on" in found and "has 24, process 1 on" in found
    assert not (tmp_path / "run").exists()


def test_nobody_waits_for_the_upload(options, two_ranks: Ranks, tmp_path: Path) -> None:
    assert two_ranks.run(pushed, {**options, "max_steps": 2}, str(tmp_path)) == [True, True]


def test_more_processes_than_texts(options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "world_size", lambda: 65)
    with pytest.raises(ValueError, match="65 processes for 64 training texts: start at most one"):
        build_run(TrainingConfig.create(**options))


def test_the_first_process_profiles_its_exchanges(
    two_ranks: Ranks, options, tmp_path: Path
) -> None:
    options |= {
        "max_steps": 5, "max_angle": 90,
        # Stage 2 exchanges gradients in the backward passes.
        "negatives": "global", "deepspeed_config": deepspeed_file(tmp_path, 2),
    }  # fmt: skip
    profiled, plain = tmp_path / "profiled", tmp_path / "plain"
    two_ranks.run(trained, {**options, "output_dir": str(profiled), "profile": 2})
    two_ranks.run(trained, {**options, "output_dir": str(plain)})
    profile = json.loads((profiled / "profile.json").read_text())
    assert profile["num_steps"] == 2
    shares = profile["shares"]
    assert sum(shares.values()) == pytest.approx(1)
    assert {name for name, share in shares.items() if share > 0} == set(shares)
    assert model_of(profiled) == model_of(plain)


def test_zero_3_without_a_launcher(options: dict[str, Any], tmp_path: Path) -> None:
    """In a process of its own, which has none of a launcher's variables, as the local backend."""
    options["strategy"] = "single"
    options["max_steps"] = 4
    sharding = {**options, "deepspeed_config": deepspeed_file(tmp_path, 3)}
    write_yaml(TrainingConfig.create(**sharding), tmp_path / "options.yaml")
    command = [sys.executable, "-m", "fusedacl.engine", "train", str(tmp_path / "options.yaml")]
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    environment = {name: value for name, value in os.environ.items() if name not in launchers}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "validation, exit at layer 2: accuracy" in done.stdout
    of_local = train(TrainingConfig.create(**{**options, "output_dir": str(tmp_path / "local")}))
    of_one = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]
    assert of_one["validation"]["2"] == pytest.approx(
        of_local["metrics"]["validation"][2], rel=1e-3
    )
