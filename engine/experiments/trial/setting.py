"""The setting of a trial: its data, its methods, and the recipe of its runs."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...config.fields import flatten
from ...config.training import TrainingConfig
from ...data.balance import BALANCED, balanced_batches
from ...data.dataset import TextData, load_splits
from ...inference.evaluation import score
from ...training.stages import plan_steps
from ..runs import OBJECTIVE_NAMES

logger = logging.getLogger("fusedacl")

BASE = OBJECTIVE_NAMES["ce"]
METHODS = tuple(OBJECTIVE_NAMES.values())
# Least number of training texts, and of texts to evaluate on, where one is 5 points of a score.
FEWEST_TEXTS = 20
# An encoder learns next to nothing in fewer steps, and all methods would score alike.
FEWEST_STEPS = 100
PILOT_STEPS = 8
# Texts of each split that a run of the pilot is evaluated on; a draw reads the whole split.
PILOT_TEXTS = 500
HELD_OUT_PERCENTAGE = 20
# Sizes that are tried where the whole set takes too long, in texts of each class.
_SIZES = (1000, 500, 200, 100, 50, 20, 10, 5)
# Options that cross-entropy alone refuses, and those of the gate, which are for ACL.
_CONTRASTIVE_OPTIONS = ("contrastive_batch_size",)
_GATE_OPTIONS = ("gate", "max_angle", "gate_scope", "gate_agreement_steps")
# Every step is logged, for its time and its angle; scores are those of the last step. The sum is
# the paper's reduction.
_DEFAULTS = {"contrastive_reduction": "sum", "logging_steps": 1, "eval_steps": 0, "save_steps": 0}
_OWN_OPTIONS = (
    "objective", "strategy", "stage1_model", "seed", "subset_seed", "resume_from_checkpoint",
    "overwrite_output_dir", "logging_steps", "eval_steps", "save_steps", "load_best_model_at_end",
    "early_stopping_patience", "profile", "push_to_hub",
)  # fmt: skip
# Options that may ask for more steps than the pilot has, and do not change the time of a step.
_WARM_UP_OPTIONS = (
    "warmup_steps", "warmup_ratio", "lr_scheduler_type", "lr_scheduler_kwargs",
    "memory_warmup_steps",
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """The training texts and the steps of each run.

    per_class: at most so many texts of each class; None: all texts. num_epochs: None where the
    options give max_steps.
    """

    per_class: int | None
    num_texts: int
    num_steps: int
    num_epochs: float | None


@dataclass(frozen=True)
class Setting:
    """A trial on one data set, before any run.

    options: of all its runs, by name. given: names of those that the user gave. class_counts:
    training texts of each class; None where a text may have several labels. constant_score: the
    best main metric of a model that gives all texts the same answer; None if there is none.
    content: SHA-256 of the texts and labels. num_evaluated: texts of the first evaluation split;
    more_evaluated: of each further one, as MNLI has.
    """

    options: Mapping[str, Any]
    given: frozenset[str]
    num_train: int
    num_evaluated: int
    class_counts: tuple[int, ...] | None
    constant_score: float | None
    content: str
    more_evaluated: tuple[int, ...] = ()

    @property
    def task(self) -> str:
        """Name of the data for tables and directories."""
        file = self.options.get("train_file")
        if file is not None:
            return Path(file).stem
        return str(self.options.get("task_name") or Path(self.options["dataset_name"]).name)

    @property
    def identity(self) -> dict[str, Any]:
        """Options and texts, which must not change while a trial is continued."""
        numbers = {"training texts": self.num_train, "evaluated texts": self.num_evaluated}
        return {**self.options, **numbers, "texts and labels": self.content}

    def size(self, per_class: int | None) -> Size:
        """The steps of a run on so many texts of each class, or on all."""
        texts = self.num_train
        if per_class is not None and self.class_counts is not None:
            texts = sum(min(count, per_class) for count in self.class_counts)
        config = TrainingConfig.create(**self.options)
        options = config.optimization
        batches = math.ceil(texts / options.per_device_train_batch_size)
        of_epoch = math.ceil(batches / options.gradient_accumulation_steps)
        if options.max_steps > 0:
            return Size(per_class, texts, options.max_steps, None)
        epochs = options.num_train_epochs
        if "num_train_epochs" not in self.given:
            epochs = max(epochs, float(math.ceil(FEWEST_STEPS / of_epoch)))
        return Size(per_class, texts, max(1, round(epochs * of_epoch)), epochs)

    def sizes(self) -> list[Size]:
        """The sizes to choose from, the largest first; one if the options name it.

        Sizes with fewer steps than a warm-up, or too few texts for `sampler` balanced, are left
        out.

        Raises:
            ValueError: no size is left; the reason is that of the largest.
        """
        limits: list[int | None] = [None]
        if not self._names_size and self.class_counts is not None:
            limits += [size for size in _SIZES if size < max(self.class_counts)]
        found, refusals = [], []
        for size in map(self.size, limits):
            try:
                self._check(size)
            except ValueError as refusal:
                refusals.append(refusal)
            else:
                found.append(size)
        if not found:
            raise refusals[0]
        return found

    @property
    def _names_size(self) -> bool:
        names = {"max_train_samples_per_class", "max_train_samples", "max_steps"}
        return not names.isdisjoint(self.given)

    def _check(self, size: Size) -> None:
        """Refuse a size that runs would refuse."""
        options = {**self.options, "objective": "acl"}
        if size.num_epochs is not None:
            options["num_train_epochs"] = size.num_epochs
        plan_steps(TrainingConfig.create(**options), num_exits=1, num_texts=size.num_texts)
        self._texts_together(size.per_class)

    def _texts_together(self, per_class: int | None) -> int:
        """Texts of a class that a batch of `sampler` balanced takes; 1 for another order.

        per_class: there are at most so many texts of each class; None: all.

        Raises:
            ValueError: they fill no batch.
        """
        config = TrainingConfig.create(**self.options)
        if config.data.sampler != BALANCED or self.class_counts is None:
            return 1
        counts = [min(count, per_class or count) for count in self.class_counts]
        labels = np.repeat(np.arange(len(counts)), counts)
        chunk = config.optimization.per_device_train_batch_size
        # Cross-entropy takes no contrastive_batch_size.
        batches = {chunk, chunk * config.chunks_together}
        chosen = config.data.samples_per_class
        return max(balanced_batches(labels, size, chosen).per_class for size in batches)

    def recipe(self, size: Size, num_draws: int) -> dict[str, Any]:
        """The recipe of the first draws: one seed each, for the texts and for the training."""
        options = dict(self.options)
        if size.per_class is not None:
            options["max_train_samples_per_class"] = size.per_class
        if size.num_epochs is not None:
            options["num_train_epochs"] = size.num_epochs
        claims = [
            {"claim": f"{name} scores higher than {BASE}", "better": name, "than": BASE}
            for name in METHODS
            if name != BASE
        ]
        full = {"methods": {name: name for name in METHODS}}
        return {
            **self._recipe(options),
            "seeds": list(range(1, num_draws + 1)),
            "report": {"claims": claims, "full_model": full},
        }

    def pilot(self) -> dict[str, Any]:
        """The recipe of a few steps of each method, for their times."""
        options = {k: v for k, v in self.options.items() if k not in _WARM_UP_OPTIONS}
        options |= {"max_steps": PILOT_STEPS, "max_eval_samples": self._pilot_texts}
        if not self._names_size and self.class_counts is not None:
            texts = math.ceil(PILOT_STEPS * self.texts_of_step / len(self.class_counts))
            options["max_train_samples_per_class"] = max(texts, self._texts_together(None))
        return {**self._recipe(options), "seeds": [0]}

    @property
    def _pilot_texts(self) -> int:
        return min(self.num_evaluated, PILOT_TEXTS)

    @property
    def texts_left(self) -> int:
        """Texts that a run of a draw is evaluated on beyond those of a run of the pilot."""
        splits = (self.num_evaluated, *self.more_evaluated)
        return sum(max(0, texts - self._pilot_texts) for texts in splits)

    @property
    def texts_of_step(self) -> int:
        """Texts of an optimizer step."""
        options = TrainingConfig.create(**self.options).optimization
        return options.per_device_train_batch_size * options.gradient_accumulation_steps

    def _recipe(self, options: Mapping[str, Any]) -> dict[str, Any]:
        methods: dict[str, dict[str, Any]] = {}
        for objective, name in OBJECTIVE_NAMES.items():
            methods[name] = {"objective": objective}
            own: tuple[str, ...] = () if objective == "ce" else _CONTRASTIVE_OPTIONS
            own += _GATE_OPTIONS if objective == "acl" else ()
            methods[name] |= {option: options[option] for option in own if option in options}
        of_methods = (*_CONTRASTIVE_OPTIONS, *_GATE_OPTIONS)
        shared = {name: value for name, value in options.items() if name not in of_methods}
        return {"defaults": shared, "tasks": {self.task: {}}, "methods": methods}


def read_setting(given: Mapping[str, Any]) -> Setting:
    """The setting of a trial with these options of `fusedacl train`; reads the data.

    Where the data have no labelled validation split, a part of the training texts is held out.

    Raises:
        ValueError: an option that the trial sets itself or that is wrong; the data are missing or
            damaged, have one class, too few texts, or a class of too few to hold one out.
    """
    for name in _OWN_OPTIONS:
        if name in given:
            raise ValueError(
                f"{name}={given[name]}: a trial sets this itself, the same for all methods. Leave "
                "it out."
            )
    config = TrainingConfig.create(**given)
    values = flatten(config)
    options = {**{name: values[name] for name in given}, **_known_defaults(given)}
    # `resolved` needs an output_dir and an objective; the sweep sets those of each run.
    TrainingConfig.create(**{**options, "output_dir": "trial", "objective": "acl"}).resolved()
    data = _load(options)
    has_validation = any(name.startswith("validation") for name in data.evaluation_splits)
    if not has_validation:
        options, data = _hold_out(options)
    for note in data.notes:
        logger.info(note)
    train, split = data.splits["train"], data.splits[data.evaluation_splits[0]]
    if min(len(train), len(split)) < FEWEST_TEXTS:
        raise ValueError(
            f"{data.name}: {len(train)} texts to train on and {len(split)} to evaluate on are too "
            f"few: a trial needs at least {FEWEST_TEXTS} of each, so that one text does not decide."
        )
    counts = None
    if not data.several_labels:
        counts = tuple(Counter(train.labels or ()).values())
    contents = {
        name: {key: content[key] for key in ("rows", "texts", "labels")}
        for name, content in data.record.splits.items()
    }
    written = json.dumps(contents, sort_keys=True).encode()
    setting = Setting(
        options, frozenset(given), len(train), len(split), counts, constant_score(data),
        content=hashlib.sha256(written).hexdigest(),
        more_evaluated=tuple(len(data.splits[name]) for name in data.evaluation_splits[1:]),
    )  # fmt: skip
    setting.sizes()
    return setting


def _hold_out(options: Mapping[str, Any]) -> tuple[dict[str, Any], TextData]:
    """Options that hold a validation split out of the training texts, and the data with it.

    Raises:
        ValueError: a class has too few texts.
    """
    holding = {**options, "validation_split_percentage": HELD_OUT_PERCENTAGE}
    file = holding.pop("validation_file", None)
    if file is not None:
        logger.info(
            "validation_file=%r is unlabelled: %d %% of the training texts are held out instead.",
            file, HELD_OUT_PERCENTAGE,
        )  # fmt: skip
    try:
        return holding, _load(holding)
    except ValueError as error:
        # Its remedies are for those who gave this option.
        start = f"validation_split_percentage={HELD_OUT_PERCENTAGE}: "
        found, _, _ = str(error).removeprefix(start).partition(": too few")
        if not str(error).startswith(start):
            raise
        raise ValueError(
            f"{found}: too few to hold {HELD_OUT_PERCENTAGE} % of each class out, as the data have "
            "no labelled validation split. Give one (--validation_file, beside --train_file), or "
            "take the class out of the data."
        ) from None


def constant_score(data: TextData) -> float | None:
    """The best score of one answer to all texts of the first evaluation split, as a fraction.

    None where a text may have several labels.
    """
    if data.several_labels:
        return None
    labels = np.array(data.splits[data.evaluation_splits[0]].labels)
    metric = data.metrics[0]
    answers = (np.full_like(labels, label) for label in np.unique(labels))
    return max(score([metric], answer, labels, data.record.f1_index)[metric] for answer in answers)


def _known_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in _DEFAULTS.items() if name not in given}


def _load(options: Mapping[str, Any]) -> TextData:
    data = TrainingConfig.create(**options).data
    if (data.max_train_samples_per_class, data.validation_split_percentage) != (None, None):
        # That of the first draw.
        data = replace(data, subset_seed=1)
    return load_splits(data)
