"""Runs that go on with another number of processes than they were started with."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed")

from fusedacl.engine import TrainingConfig, train
from rank_pool import Ranks
from tiny_runs import records
from training_cases import deepspeed_file, held, refused, stopped, trained

# Steps 3 and 11 lie in the first and in the second stage.
CASES: dict[str, dict[str, Any]] = {
    "ZeRO 0": {"stage": 0, "strategy": "joint"},
    "ZeRO 2, bf16": {"stage": 2, "bf16": True, "temperature_learning_rate": 0.05},
    # Groups of parameters are split, and the processes' parts begin and end within a parameter.
    "ZeRO 3, small groups": {"stage": 3, "sub_group_size": 1000, "strategy": "two_stage"},
}


@pytest.fixture
def options(tiny_options: dict[str, Any]) -> dict[str, Any]:
    return {
        **tiny_options,
        "learning_rate": 1e-3, "dropout": 0.0, "num_train_epochs": 2, "max_train_samples": 60,
        "per_device_train_batch_size": 4, "aux_weight": 0.3, "contrastive_reduction": "sum",
        "negatives": "global", "logging_steps": 1, "save_steps": 0, "device": "cpu",
        # No angle is near it, so that rounding decides nothing.
        "max_angle": 180,
    }  # fmt: skip


@pytest.fixture
def one_rank(ranks_of: Any) -> Ranks:
    return ranks_of("one", 1, 90.0)


def whole(parts: list[list[tuple[str, int, list[Any]]]], replicated: bool) -> dict[str, Any]:
    """The values of each parameter, from what all processes hold of it."""
    by_name: dict[str, list[tuple[int, list[Any]]]] = {}
    for of_rank in parts[:1] if replicated else parts:
        for name, start, values in of_rank:
            by_name.setdefault(name, []).append((start, values))
    found = {}
    for name, pieces in by_name.items():
        *tensors, steps = zip(*(values for _, values in sorted(pieces)), strict=True)
        assert len(set(steps)) == 1
        found[name] = [*(list(chain.from_iterable(tensor)) for tensor in tensors), steps[0]]
    return found


@pytest.mark.parametrize("case", CASES)
def test_two_processes_then_one_then_two(
    case: str, options, one_rank: Ranks, two_ranks: Ranks, tmp_path: Path
) -> None:
    """Weights, moments and steps are the same to the last bit, whoever holds them."""
    settings = {**options, **CASES[case]}
    zero = {name: settings.pop(name) for name in ("stage", "sub_group_size") if name in settings}
    settings["deepspeed_config"] = deepspeed_file(tmp_path, zero_optimization=zero)
    resumed = {**settings, "resume_from_checkpoint": "latest"}
    of_one = {**resumed, "per_device_train_batch_size": 8}
    assert [code for code, _ in two_ranks.run(stopped, settings, 3)] == [143, 143]
    assert_same(one_rank.run(held, of_one), two_ranks.run(held, resumed), zero["stage"])
    assert "checkpoint-11" in one_rank.run(stopped, of_one, 11, 0)[0][1]
    assert_same(two_ranks.run(held, resumed), one_rank.run(held, of_one), zero["stage"])


def assert_same(of_one: list[Any], of_two: list[Any], stage: int) -> None:
    found, wanted = whole(of_one, stage == 0), whole(of_two, stage == 0)
    assert found == wanted
    # Weights, two moments, and the steps that made them.
    assert all(len(values) == 4 and values[-1] > 0 for values in found.values())
    assert any(any(values[2]) for values in found.values())


def test_the_course_of_a_run_does_not_depend_on_it(
    options, one_rank: Ranks, two_ranks: Ranks, tmp_path: Path
) -> None:
    settings = {**options, "deepspeed_config": deepspeed_file(tmp_path, 1)}
    whole, parts = ({**settings, "output_dir": str(tmp_path / name)} for name in ("whole", "parts"))
    two_ranks.run(trained, whole)
    resumed = {**parts, "resume_from_checkpoint": "latest"}
    two_ranks.run(stopped, parts, 3)
    one_rank.run(stopped, {**resumed, "per_device_train_batch_size": 8}, 11, 0)
    two_ranks.run(trained, resumed)
    lines = [
        [(line["step"], line["learning_rate"], line["loss"]) for line in records(run, "train")]
        for run in (tmp_path / "parts", tmp_path / "whole")
    ]
    assert len(lines[0]) == len(lines[1]) > 11
    for ours, theirs in zip(*lines, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-2)


def test_what_is_refused(options, one_rank: Ranks, two_ranks: Ranks, tmp_path: Path) -> None:
    def message(ranks: Ranks, **changes: Any) -> str:
        return str(ranks.run(refused, {**resumed, **changes}, {})[0])

    resumed = {**options, "resume_from_checkpoint": "latest"}
    two_ranks.run(stopped, options, 3)
    found = message(one_rank)
    assert (
        "saved by 2 process(es), and this run has 1: a step had 8 texts and would have 4" in found
    )
    assert (
        "the product of per_device_train_batch_size and gradient_accumulation_steps must" in found
    )
    assert "learning_rate: 0.001 then" in message(
        one_rank, per_device_train_batch_size=8, learning_rate=2e-3
    )
    with pytest.raises(ValueError, match="joins. Start it with a launcher"):
        train(TrainingConfig.create(**resumed | {"per_device_train_batch_size": 8}))
    # Neither two processes may have other batches than they had.
    assert "per_device_train_batch_size: 4 then, 8 now" in message(
        two_ranks, per_device_train_batch_size=8
    )
    memory = {"memory_size": 12, "output_dir": str(tmp_path / "memory")}
    two_ranks.run(stopped, {**options, **memory}, 3)
    memory["per_device_train_batch_size"] = 8
    assert "each process has a memory of its own" in message(one_rank, **memory)


def test_a_run_without_deepspeed_has_no_parts(options, one_rank: Ranks, two_ranks: Ranks) -> None:
    train(TrainingConfig.create(**{**options, "save_steps": 3, "max_steps": 6}))
    resumed = {**options, "max_steps": 6, "resume_from_checkpoint": "checkpoint-3"}
    found = one_rank.run(refused, resumed, {})[0]
    assert "saved by a run without DeepSpeed: resume without a launcher" in found
    resumed["per_device_train_batch_size"] = 2
    found = two_ranks.run(refused, resumed, {})[0]
    assert "was saved by 1 process(es), and this run has 2: it does not say which parts" in found
