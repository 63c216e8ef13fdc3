"""Combinations of training options, drawn so that every pair of values occurs in one."""

from __future__ import annotations

import contextlib
import itertools
import random
from pathlib import Path
from typing import Any

from fusedacl.engine import TrainingConfig

Combination = dict[str, Any]
# Two options with a value each.
Pair = frozenset[tuple[str, Any]]

# More of them need fewer combinations and a longer choice.
CANDIDATES = 50
MAX_DRAWS = 40
STEP_TEXTS = 8
CLASS_WEIGHTS = {"negative": 1, "positive": 3}
# The end of an odd epoch, and the middle of an even one; epochs have two steps.
RESUME_STEPS = {"epoch end": 2, "epoch middle": 3}
VALUES: dict[str, tuple[Any, ...]] = {
    "engine": ("local", "zero0", "zero1", "zero2", "zero3"),
    "strategy": ("single", "joint", "two_stage", "alternating"),
    "objective": ("ce", "scl", "acl"),
    # Bounds that no angle comes near, so that rounding decides nothing.
    "max_angle": (180, 0),
    "gate_scope": ("all", "head", "top:1"),
    "precision": ("fp32", "bf16", "fp16"),
    "gradient_accumulation_steps": (1, 2),
    "large_batch": (False, True),
    "feature_cache": (False, True),
    "exit_head": ("mha", "linear"),
    "exit_layers": (None, "1,4"),
    "load_best_model_at_end": (False, True),
    "cross_entropy": ("plain", "weighted"),
    "course": ("linear", "stopped"),
    "encoder": ("plain", "checkpointed", "frozen"),
    "sampler": ("random", "balanced"),
    "resume": (None, *RESUME_STEPS),
}


# Every pair of these values is drawn. The other stages of ZeRO differ in what they shard, not in
# what an option does to a step: test_zero_parity compares all, and `make combinations` draws them.
PAIRED = VALUES | {"engine": ("local", "zero2", "zero3")}
DEFAULTS: Combination = {name: values[0] for name, values in VALUES.items()}
# Pairs that are refused whatever the other options are.
REFUSED: list[Combination] = [
    *(
        {"strategy": strategy, "gate_scope": scope}
        for strategy in ("joint", "alternating")
        for scope in ("head", "top:1")
    ),
    *({"strategy": name, "feature_cache": True} for name in ("single", "joint", "alternating")),
    {"strategy": "single", "exit_layers": "1,4"},
    *({"objective": "ce", "gate_scope": scope} for scope in ("head", "top:1")),
    {"objective": "ce", "large_batch": True},
    *({"gate_scope": scope, "gradient_accumulation_steps": 2} for scope in ("head", "top:1")),
]


def options_of(combination: Combination, output_dir: Path, **common: Any) -> dict[str, Any]:
    """Training options; an optimizer step has 8 texts and one contrastive batch per forward pass,
    or one of all 8 with `large_batch`."""
    accumulation = combination["gradient_accumulation_steps"]
    processes = 1 if combination["engine"] == "local" else 2
    options = {
        name: combination[name]
        for name in (
            "strategy", "objective", "gate_scope", "gradient_accumulation_steps", "exit_head",
            "exit_layers", "load_best_model_at_end", "sampler",
        )
    }  # fmt: skip
    options |= {
        "max_angle": combination["max_angle"],
        "gate": None if combination["objective"] == "ce" else "angle",
        "per_device_train_batch_size": STEP_TEXTS // processes // accumulation,
        "negatives": "local" if processes == 1 else "global",
        "num_train_epochs": 3,
        "output_dir": str(output_dir),
        **common,
    }
    if combination["large_batch"]:
        options["contrastive_batch_size"] = STEP_TEXTS // processes
    if combination["feature_cache"]:
        options["feature_cache"] = str(output_dir) + "-features"
    if combination["cross_entropy"] == "weighted":
        # The caller writes CLASS_WEIGHTS there; a check of the options does not read them.
        file = f"{output_dir}-class_weights.json"
        options |= {"class_weights": file, "label_smoothing_factor": 0.1}
    if combination["course"] == "stopped":
        # No loss falls so far: each stage ends after the second evaluation that counts.
        options |= {"early_stopping_patience": 1, "early_stopping_threshold": 1e9}
        options |= {"lr_scheduler_type": "cosine", "warmup_steps": 1}
    if combination["encoder"] == "checkpointed":
        options["gradient_checkpointing"] = True
    if combination["encoder"] == "frozen":
        options["freeze_layers"] = 1
    if combination["precision"] != "fp32":
        options[combination["precision"]] = True
    return options


def plain(combination: Combination) -> Combination:
    """The combination that must train alike in the simplest way."""
    simplest = {
        "engine": "local", "precision": "fp32", "feature_cache": False,
        "load_best_model_at_end": False, "resume": None,
    }  # fmt: skip
    if combination["encoder"] == "checkpointed":
        simplest["encoder"] = "plain"
    if combination["large_batch"]:
        simplest |= {"large_batch": False, "gradient_accumulation_steps": 1}
    return {**combination, **simplest}


def pairs() -> list[Combination]:
    """Every pair of values of two options in PAIRED."""
    return [
        {first: one, second: two}
        for first, second in itertools.combinations(PAIRED, 2)
        for one, two in itertools.product(PAIRED[first], PAIRED[second])
    ]


def draw(seed: int, number: int | None = None) -> list[Combination]:
    """Combinations that the configuration allows: `number` of them, or enough for every pair of
    `pairs` but those of `REFUSED`."""
    generator = random.Random(seed)
    if number is not None:
        return [_completed({}, generator, set(), VALUES) for _ in range(number)]
    wanted = [frozenset(pair.items()) for pair in pairs() if pair not in REFUSED]
    missing = set(wanted)
    drawn: list[Combination] = []
    for pair in wanted:
        if pair in missing:
            drawn.append(_completed(dict(pair), generator, missing, PAIRED))
            missing -= _pairs_of(drawn[-1])
    return drawn


def check(combination: Combination) -> None:
    """Refuse a combination as `fusedacl train` does.

    Raises:
        ValueError: options contradict each other.
    """
    options = options_of(combination, Path("run"), model_name_or_path="encoder")
    TrainingConfig.create(**options).resolved()


def _completed(
    pair: Combination,
    generator: random.Random,
    missing: set[Pair],
    choices: dict[str, tuple[Any, ...]],
) -> Combination:
    """A combination with these values that the configuration allows; of some candidates the one
    with most of the missing pairs."""
    for _ in range(MAX_DRAWS):
        candidates = [
            {name: generator.choice(values) for name, values in choices.items()} | pair
            for _ in range(CANDIDATES)
        ]
        candidates.sort(key=lambda candidate: -len(_pairs_of(candidate) & missing))
        for candidate in candidates:
            with contextlib.suppress(ValueError):
                check(candidate)
                return candidate
    raise AssertionError(f"no combination with {pair} is allowed: is it one of REFUSED?")


def _pairs_of(combination: Combination) -> set[Pair]:
    return {frozenset(pair) for pair in itertools.combinations(combination.items(), 2)}


def name_of(combination: Combination) -> str:
    """The values that differ from the first of their option."""
    changed = [f"{n}={value}" for n, value in combination.items() if value != DEFAULTS[n]]
    return " ".join(changed) or "defaults"
