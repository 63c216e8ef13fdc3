"""Trainers of the step suite: ours with each option, the Hugging Face Trainer, a hand-written loop.

All start from the same weights and use the same batches in the same order, the same optimizer and
the same schedule. Without dropout their losses agree up to rounding.
"""

import json
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import get_linear_schedule_with_warmup

from ....engine.backends.deepspeed.gradients import check_version
from ....engine.backends.optimizers import decay_groups
from ....engine.config.training import TrainingConfig
from ....engine.data.batching import collate, epoch_batches
from ....engine.data.quickstart import LABEL_NAMES, minilm_path, quickstart_splits
from ....engine.integrations.arguments import ACLTrainingArguments
from ....engine.integrations.monitor import AngleMonitor
from ....engine.integrations.trainer import ACLTrainer
from ....engine.model.saved import load_tokenizer
from ....engine.training.builder import RunParts, build_run
from ....engine.training.logs.metrics_log import read_records
from ..baselines import dense_acl
from ..exits.second_stage import SteppedTrainer
from ..suite import flat_gradient
from .names import (
    ACL,
    ACL_TRAINER,
    CE,
    COMPILED,
    HUGGING_FACE,
    MONITORED,
    TWO_BACKWARD,
    UNGATED,
)  # fmt: skip

# A multiple of every batch size here, so that all batches are full.
NUM_TEXTS = 512
LEARNING_RATE = 1e-4
AUXILIARY_WEIGHT = 0.02

# Options of our trainer, and of the runs that the others take over.
OPTIONS: dict[str, dict[str, Any]] = {
    CE: {"objective": "ce"},
    "fusedacl_scl": {"objective": "scl"},
    "fusedacl_acl_ungated": {"objective": "acl", "gate": "none"},
    ACL: {"objective": "acl"},
    "fusedacl_acl_top2": {"objective": "acl", "gate_scope": "top:2"},
    "fusedacl_acl_head": {"objective": "acl", "gate_scope": "head"},
    "deepspeed_ce": {"objective": "ce", "deepspeed_config": "deepspeed.json"},
    "deepspeed_acl": {"objective": "acl", "deepspeed_config": "deepspeed.json"},
    COMPILED: {"objective": "ce", "torch_compile": True},
    HUGGING_FACE: {"objective": "ce"},
    TWO_BACKWARD: {"objective": "acl"},
    ACL_TRAINER: {"objective": "acl"},
    UNGATED: {"objective": "acl", "gate": "none"},
    MONITORED: {"objective": "acl", "gate": "none"},
}
# Made on transformers' Trainer, which logs four decimals.
ON_TRAINER = (HUGGING_FACE, ACL_TRAINER, UNGATED, MONITORED)
OURS = OPTIONS.keys() - {*ON_TRAINER, TWO_BACKWARD}


@dataclass(frozen=True)
class Case:
    """A model and the shape of its batches.

    model: "minilm", "bert-base" or the directory of an encoder with its tokenizer.
    num_layers: keep only the first layers; None keeps all.
    chunks: number of batches in a cached contrastive batch; None for a step of one batch.
    """

    model: str
    batch: int
    tokens: int
    num_layers: int | None = None
    chunks: int | None = None

    @property
    def width(self) -> int:
        """Width of the hidden states, at which the rate of matrix products is measured."""
        return {"minilm": 384, "bert-base": 768}.get(self.model, 64)

    @property
    def words(self) -> str:
        names = {"minilm": "MiniLM (6 x 384)", "bert-base": "BERT-base's shape, random weights"}
        name = names.get(self.model, Path(self.model).name)
        layers = "" if self.num_layers is None else f", {self.num_layers} layers"
        words = f"{name}{layers}, {self.batch} texts of {self.tokens} tokens"
        if self.chunks is None:
            return words
        return f"contrastive batch of {self.chunks} chunks: {words} per chunk"


class Files:
    """Encoders and texts in a directory, made on the first request."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def encoder(self, case: Case) -> Path:
        if case.model == "minilm":
            return minilm_path()
        if case.model != "bert-base":
            return Path(case.model)
        directory = self.directory / case.model
        if not directory.exists():
            torch.manual_seed(0)
            transformers.BertModel(transformers.BertConfig()).save_pretrained(directory)
            # MiniLM has BERT's vocabulary.
            load_tokenizer(str(minilm_path())).save_pretrained(directory)
        return directory

    def texts(self, case: Case) -> Path:
        """A file of labelled pairs, so long that truncation leaves exactly `case.tokens` tokens."""
        path = self.directory / f"train_{case.tokens}.jsonl"
        if not path.exists():
            rows = quickstart_splits(num_train=NUM_TEXTS)["train"]
            # A sentence has several words, so this many repetitions are long enough.
            times = case.tokens // 6 + 1
            with path.open("w") as file:
                for row in rows:
                    pair = {key: f"{row[key]} " * times for key in ("sentence1", "sentence2")}
                    file.write(json.dumps(pair | {"label": LABEL_NAMES[int(row["label"])]}) + "\n")
        return path


AfterStep = Callable[[int], None]


class Clock:
    """Seconds from the end of one step to the end of the next, without `after_step`."""

    def __init__(self, after_step: AfterStep | None = None) -> None:
        self.seconds: list[float] = []
        self._after_step = after_step
        self.restart()

    def restart(self) -> None:
        self._last = time.perf_counter()

    def tick(self) -> None:
        # Our steps do not wait for the device.
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._last)
        if self._after_step is not None:
            self._after_step(len(self.seconds))
        self._last = time.perf_counter()


class StepTrainer(ABC):
    """A way of training: ours with given options, or another one with the same settings.

    losses: cross-entropy and auxiliary loss of each step of the last turn that recorded them.
    shares: parts of the steps of the last turn that was profiled.
    """

    def __init__(self, case: Case, files: Files, name: str, **options: Any) -> None:
        if "deepspeed_config" in options:
            # An empty configuration: one process without ZeRO.
            file = files.directory / options["deepspeed_config"]
            file.write_text("{}\n")
            options["deepspeed_config"] = str(file)
        self.options = {
            "train_file": str(files.texts(case)),
            "model_name_or_path": str(files.encoder(case)),
            "num_hidden_layers": case.num_layers,
            "max_seq_length": case.tokens,
            "per_device_train_batch_size": case.batch,
            "learning_rate": LEARNING_RATE,
            "aux_weight": AUXILIARY_WEIGHT,
            "save_steps": 0,
            "disable_tqdm": True,
            "device": "cpu",
            **options,
        }
        self.losses: list[tuple[float, float | None]] = []
        self.shares: dict[str, float] = {}
        self._files, self._name = files, name

    def config(self, num_steps: int, **changes: Any) -> TrainingConfig:
        # These runs never end and keep their directories locked, so each needs its own.
        directory = tempfile.mkdtemp(prefix=self._name, dir=self._files.directory)
        settings = {"output_dir": directory, "max_steps": num_steps, "logging_steps": num_steps}
        return TrainingConfig.create(**{**self.options, **settings, **changes})

    def turn(
        self, num_steps: int, after_step: AfterStep | None = None, **changes: Any
    ) -> list[float]:
        """Seconds of each step of a new run; the option `logging_steps=1` records the losses."""
        clock = Clock(after_step)
        self.train(num_steps, clock, **changes)
        return clock.seconds

    @abstractmethod
    def train(self, num_steps: int, clock: Clock, **changes: Any) -> None:
        """Make a new run; restart the clock before its first step, and let it tick after each."""


class Ours(StepTrainer):
    def train(self, num_steps: int, clock: Clock, **changes: Any) -> None:
        trainer = SteppedTrainer(self.config(num_steps, **changes))
        clock.restart()
        with trainer.profiler:
            for _ in range(num_steps):
                trainer.one_step()
                clock.tick()
        if trainer.profiler.profile is not None:
            self.shares = trainer.profiler.profile["shares"]
        records = read_records(trainer.output_dir / "metrics.jsonl")
        self.losses = [(record["loss_ce"], record.get("loss_aux")) for record in records]
        trainer.backend.close()


class OnTrainer(StepTrainer):
    """transformers' Trainer with the same model; `ACLTrainer` for other losses than the model's."""

    def train(self, num_steps: int, clock: Clock, **changes: Any) -> None:
        parts = build_run(self.config(num_steps, **changes))
        options, callback = parts.config.optimization, _ClockCallback(clock)
        arguments: dict[str, Any] = {
            "output_dir": str(self._files.directory / self._name),
            "max_steps": num_steps,
            "per_device_train_batch_size": options.per_device_train_batch_size,
            "learning_rate": options.learning_rate,
            "warmup_steps": round(options.warmup_ratio * num_steps),
            "weight_decay": options.weight_decay,
            "max_grad_norm": options.max_grad_norm,
            "optim": "adamw_torch_fused",
            "use_cpu": True,
            "save_strategy": "no",
            "logging_steps": parts.config.run.logging_steps,
            "report_to": "none",
            "disable_tqdm": True,
            # Keeps the order of our batches.
            "train_sampling_strategy": "sequential",
        }
        settings: dict[str, Any] = {
            "model": parts.model,
            "train_dataset": _features(parts),
            "data_collator": transformers.DataCollatorWithPadding(parts.tokenizer),
            "callbacks": [callback],
        }
        if self._name == HUGGING_FACE:
            made = transformers.Trainer(
                args=transformers.TrainingArguments(**arguments), **settings
            )
        else:
            objective = parts.config.objective
            own = ACLTrainingArguments(
                **arguments, objective="acl", gate=objective.gate, aux_weight=objective.aux_weight
            )
            if self._name == MONITORED:
                settings["callbacks"].insert(0, AngleMonitor(every=1))
            made = ACLTrainer(args=own, **settings)
        made.remove_callback(transformers.PrinterCallback)
        made.train()
        self.losses = callback.losses


class _ClockCallback(transformers.TrainerCallback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.losses: list[tuple[float, float | None]] = []

    def on_train_begin(self, *arguments: Any, **options: Any) -> None:
        self.clock.restart()

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        self.clock.tick()

    def on_log(self, *arguments: Any, logs: dict[str, float] | None = None, **options: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append((logs.get("loss_ce", logs["loss"]), logs.get("loss_aux")))


def _features(trainer: RunParts) -> list[dict[str, Any]]:
    """The texts of an epoch, in the order of our batches."""
    split = trainer.train_split
    assert split.labels is not None
    features = []
    for row in np.concatenate(_batches(trainer, epoch=0)):
        span = slice(split.offsets[row], split.offsets[row + 1])
        tokens, label = split.tokens[span].tolist(), int(split.labels[row])
        feature = {"input_ids": tokens, "labels": label, "attention_mask": [1] * len(tokens)}
        if split.token_types is not None:
            feature["token_type_ids"] = split.token_types[span].tolist()
        features.append(feature)
    return features


def _batches(trainer: RunParts, epoch: int) -> list[np.ndarray]:
    seed, lengths = trainer.config.optimization.seed, trainer.train_split.lengths
    return epoch_batches(lengths, trainer.plan.batch_size, seed=seed, epoch=epoch)


class TwoBackward(StepTrainer):
    """ACL-Grad in plain PyTorch, with a dense contrastive loss."""

    def train(self, num_steps: int, clock: Clock, **changes: Any) -> None:
        trainer = build_run(self.config(num_steps, **changes))
        options, model = trainer.config.optimization, trainer.model.train()
        parameters = list(model.parameters())
        optimizer = torch.optim.AdamW(
            decay_groups(parameters, options.weight_decay), lr=options.learning_rate, fused=True
        )
        scheduler = get_linear_schedule_with_warmup(
            optimizer, round(options.warmup_ratio * num_steps), num_steps
        )
        is_recorded = trainer.config.run.logging_steps == 1
        self.losses = []
        clock.restart()
        for step in range(num_steps):
            epoch, index = divmod(step, trainer.plan.steps_per_epoch)
            if index == 0:
                batches = _batches(trainer, epoch)
            padding = trainer.tokenizer.pad_token_id
            batch = collate(trainer.train_split, batches[index], padding)
            labels = batch.pop("labels")
            output = model(**batch)
            main = cross_entropy(output.logits, labels)
            label_embeddings = model.label_embeddings_of([-1])[0]
            auxiliary = dense_acl(output.exit_embeddings[-1], labels, label_embeddings)
            main_gradient = flat_gradient(main, parameters)
            auxiliary_gradient = flat_gradient(auxiliary, parameters, retain_graph=False)
            if cosine_similarity(main_gradient, auxiliary_gradient, dim=0) >= 0:
                main_gradient = torch.lerp(main_gradient, auxiliary_gradient, AUXILIARY_WEIGHT)
            parts = main_gradient.split([parameter.numel() for parameter in parameters])
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.grad = part.view_as(parameter)
            torch.nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if is_recorded:
                self.losses.append((main.item(), auxiliary.item()))
            # Free the step's tensors before the next step, as a function of its own would.
            del output, main, auxiliary, main_gradient, auxiliary_gradient, parts, part
            clock.tick()


def make_trainer(name: str, case: Case, files: Files, **more: Any) -> StepTrainer:
    """Make the trainer of that name; `more` are further options of ours."""
    others: dict[str, type[StepTrainer]] = {TWO_BACKWARD: TwoBackward}
    others |= dict.fromkeys(ON_TRAINER, OnTrainer)
    cls = others.get(name, Ours)
    return cls(case, files, name, **{**OPTIONS[name], **more})


def obstacle(name: str) -> str | None:
    """A message if a trainer cannot run here, else None."""
    options = OPTIONS[name]
    try:
        if "deepspeed_config" in options:
            check_version()
        TrainingConfig.create(**options)
    except ValueError as error:
        return str(error)
    return None
