"""Runs with drawn combinations of options equal the plain run, or are refused in words.

`make combinations SEED=3 NUMBER=50` draws others.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

pytest.importorskip("deepspeed")

from combination_cases import trained_model
from fusedacl.engine import EvaluationConfig, evaluate
from fusedacl.engine.config.fields import build
from fusedacl.engine.runtime.manifest import step_of
from option_combinations import (
    CLASS_WEIGHTS,
    DEFAULTS,
    REFUSED,
    RESUME_STEPS,
    Combination,
    check,
    draw,
    name_of,
    options_of,
    pairs,
    plain,
)
from rank_pool import Ranks
from tiny_runs import weights
from training_cases import stopped

LEARNING_RATE = 1e-3
NUMBER = os.environ.get("COMBINATIONS_NUMBER")
DRAWN = draw(int(os.environ.get("COMBINATIONS_SEED", "4")), NUMBER and int(NUMBER))
# Largest mean difference from the plain run's weights, as a share of the way that AdamW could go.
TOLERANCES = {"fp32": 0.03, "bf16": 0.6, "fp16": 0.3}
FEATURE_TOLERANCE = 0.1  # cached states are float16


@pytest.fixture
def common(deep_bert: Path, tiny_data: Path) -> dict[str, Any]:
    return {
        "task_name": "opinions", "data_dir": str(tiny_data), "model_name_or_path": str(deep_bert),
        "max_seq_length": 16, "max_train_samples": 16, "max_eval_samples": 8, "dropout": 0.0,
        "learning_rate": LEARNING_RATE, "aux_weight": 0.3, "device": "cpu", "disable_tqdm": True,
        "save_total_limit": None, "logging_steps": 1, "weight_decay": 0.0,
    }  # fmt: skip


@pytest.fixture(scope="module")
def plain_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the plain runs, which several combinations share."""
    return tmp_path_factory.mktemp("plain")


def run(combination: Combination, options: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """The results of a run; its processes end with the same weights."""
    if "class_weights" in options:
        Path(options["class_weights"]).write_text(json.dumps(CLASS_WEIGHTS))
    if combination["engine"] == "local":
        return trained_model(0, options)[0]
    (results, digest), (others, other_digest) = ranks.run(trained_model, options)
    assert digest == other_digest
    assert results["metrics"] == others["metrics"]
    return results


def with_engine(combination: Combination, options: dict[str, Any]) -> dict[str, Any]:
    engine = combination["engine"]
    if engine == "local":
        return options
    file = Path(options["output_dir"] + "-deepspeed.json")
    settings: dict[str, Any] = {"zero_optimization": {"stage": int(engine[-1])}}
    if combination["precision"] == "fp16":
        # With DeepSpeed's own scale the first steps overflow, and are skipped.
        settings["fp16"] = {"enabled": True, "initial_scale_power": 8}
    file.write_text(json.dumps(settings))
    return {**options, "deepspeed_config": str(file)}


def differences(ours: dict[str, Tensor], theirs: dict[str, Tensor], steps: int) -> dict[str, float]:
    """Mean difference of each weight as a share of the way that AdamW can have gone.

    The bias of the keys changes no softmax: its gradient is rounding, which AdamW blows up.
    """
    assert ours.keys() == theirs.keys()
    return {
        name: float((ours[name] - theirs[name]).abs().mean()) / (LEARNING_RATE * steps)
        for name in ours
        if not name.endswith("key.bias")
    }


@pytest.mark.parametrize("combination", DRAWN, ids=map(name_of, DRAWN))
def test_a_combination_trains_as_the_plain_run(
    combination: Combination,
    common: dict[str, Any],
    two_ranks: Ranks,
    plain_runs: Path,
    tmp_path: Path,
) -> None:
    options = with_engine(combination, options_of(combination, tmp_path / "run", **common))
    try:
        results = run(combination, options, two_ranks)
    except AssertionError as error:
        # A processor without float16 arithmetic.
        if "fp16: DeepSpeed refuses it on this device" in str(error):
            return
        raise
    simplest = plain(combination)
    plain_run = plain_runs / hashlib.sha256(name_of(simplest).encode()).hexdigest()[:16]
    if not plain_run.exists():
        run(simplest, options_of(simplest, plain_run, **common), two_ranks)
    last = max(step_of(path) for path in plain_run.glob("checkpoint-*"))
    step = results["best"]["step"] if combination["load_best_model_at_end"] else last
    tolerance = TOLERANCES[combination["precision"]]
    if combination["feature_cache"]:
        tolerance = max(tolerance, FEATURE_TOLERANCE)
    ours = weights(tmp_path / "run")
    found = differences(ours, weights(plain_run / f"checkpoint-{step}"), step)
    assert {name: share for name, share in found.items() if share > tolerance} == {}
    saved = evaluate(
        build(
            EvaluationConfig,
            {
                "model_name_or_path": str(tmp_path / "run"), "disable_tqdm": True,
                **{n: common[n] for n in ("task_name", "data_dir", "max_eval_samples", "device")},
            },
        )
    )  # fmt: skip
    for layer, scores in saved["validation"].items():
        exact = combination["precision"] == "fp32"
        expected = pytest.approx(scores["loss"], rel=1e-4 if exact else 5e-2)
        assert results["metrics"]["validation"][layer]["loss"] == expected
    if combination["resume"] is not None:
        _check_resumed(combination, options, two_ranks, ours, tmp_path)


def _check_resumed(
    combination: Combination,
    options: dict[str, Any],
    ranks: Ranks,
    whole: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    """A run that is stopped at a step and resumed ends with bitwise the same weights."""
    step = RESUME_STEPS[combination["resume"]]
    options = {**options, "output_dir": str(tmp_path / "parts")}
    if combination["engine"] == "local":
        code, words = stopped(1, options, step)
    else:
        (code, words), _ = ranks.run(stopped, options, step)
    assert code == 143 and f"checkpoint-{step}" in words
    run(combination, {**options, "resume_from_checkpoint": "latest"}, ranks)
    resumed = weights(tmp_path / "parts")
    assert [name for name in whole if not whole[name].equal(resumed[name])] == []


def test_every_pair_of_values_is_drawn_or_refused() -> None:
    drawn = draw(2)
    for pair in pairs():
        assert (pair in REFUSED) != any(pair.items() <= found.items() for found in drawn)


@pytest.mark.parametrize("pair", REFUSED, ids=str)
def test_a_refused_pair_is_refused_in_words(pair: Combination) -> None:
    with pytest.raises(ValueError, match="|".join((*pair, "contrastive_batch_size"))):
        check({**DEFAULTS, **pair})
