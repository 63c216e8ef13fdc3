"""Models, batches and runs for the tests of `ACLTrainer`, and the loops that it is held against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fusedacl.engine import (
    ACLTrainer,
    ACLTrainingArguments,
    GradientGate,
    MultiExitForSequenceClassification,
)
from fusedacl.kernels import acl_cl_loss, acl_loss
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.trainer_utils import set_seed

Batch = dict[str, Tensor]
NUM_CLASSES = 3


def rows(number: int) -> list[dict[str, Any]]:
    """Texts of equal length whose class can be learnt from their first word."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for index in range(number):
        words = torch.randint(8, 28, (5,), generator=generator)
        words[0] = 5 + index % NUM_CLASSES
        found.append({"input_ids": [2, *words.tolist(), 3], "labels": index % NUM_CLASSES})
    return found


def collate(features: Sequence[dict[str, Any]]) -> Batch:
    ids = torch.tensor([feature["input_ids"] for feature in features])
    labels = torch.tensor([feature["labels"] for feature in features])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class Recorder:
    """A collator that keeps the batches of training."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def __call__(self, features: Sequence[dict[str, Any]]) -> Batch:
        self.batches.append(collate(features))
        return self.batches[-1]


def plain_model(encoder: Path) -> Any:
    """BERT's own classifier, without dropout."""
    set_seed(0)
    config = AutoConfig.from_pretrained(
        encoder,
        num_labels=NUM_CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return AutoModelForSequenceClassification.from_pretrained(encoder, config=config)


def exit_model(encoder: Path, **options: Any) -> MultiExitForSequenceClassification:
    """An exit on every layer, without dropout; options: of the exits."""
    set_seed(0)
    names = [str(index) for index in range(NUM_CLASSES)]
    return MultiExitForSequenceClassification.from_encoder(
        str(encoder), label_names=names, dropout=0.0, exit_layers=[], **options
    )


def arguments(directory: Path, **options: Any) -> ACLTrainingArguments:
    defaults = {
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        # Large, so that rounding of a gradient of nearly zero does not decide a step's direction.
        "adam_epsilon": 1e-2,
        "per_device_train_batch_size": 6,
        "aux_weight": 0.3,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return ACLTrainingArguments(str(directory), **{**defaults, **options})


def trainer_of(model: Any, directory: Path, number: int = 24, **options: Any) -> ACLTrainer:
    """A trainer on `number` texts; `options` are those of the arguments and of the trainer."""
    names = (
        *("callbacks", "compute_loss_func", "compute_metrics", "model_init", "optimizers"),
        *("eval_dataset", "data_collator"),
    )
    given = {name: options.pop(name) for name in names if name in options}
    return ACLTrainer(
        model,
        arguments(directory, **options),
        train_dataset=rows(number),
        **{"data_collator": collate, **given},
    )


def steps(trainer: ACLTrainer) -> list[dict[str, float]]:
    """The log of each step of training."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def losses_of(model: Any, batch: Batch, strategy: str, smoothing: float = 0.0) -> tuple[Any, Any]:
    """Cross-entropies [E] and contrastive losses [E] of the trained exits, by hand."""
    inputs, labels = {k: v for k, v in batch.items() if k != "labels"}, batch["labels"]
    if strategy == "plain":
        hidden = model.bert(**inputs).pooler_output[None]
        logits = functional.linear(hidden, model.classifier.weight, model.classifier.bias)
        weights = model.classifier.weight[None]
    else:
        output = model(**inputs)
        hidden, logits, weights = (
            output.exit_embeddings, output.exit_logits, model.label_embeddings
        )  # fmt: skip
    teacher = (hidden[-1].detach(), weights[-1].detach())
    if strategy == "second_stage":
        hidden, logits, weights = hidden[:-1], logits[:-1], weights[:-1]
    elif strategy == "single":
        hidden, logits, weights = hidden[-1:], logits[-1:], weights[-1:]
    main = torch.stack(
        [functional.cross_entropy(scores, labels, label_smoothing=smoothing) for scores in logits]
    )
    if strategy == "second_stage":
        return main, acl_cl_loss(hidden, labels, weights, *teacher)
    return main, acl_loss(hidden, labels, weights)


def plain_loop(
    model: Any,
    windows: Sequence[Sequence[Batch]],
    strategy: str,
    *,
    groups: Sequence[int] | None = None,
    smoothing: float = 0.0,
) -> list[dict[str, Any]]:
    """The steps of `arguments` with GradientGate; each window is the batches of a step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    gate = GradientGate(trained, weight=0.3, groups=groups)
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, eps=1e-2)
    model.train()
    found = []
    for step, window in enumerate(windows):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - step / len(windows))
        total = sum(len(batch["labels"]) for batch in window)
        sums: Any = 0.0
        for batch in window:
            share = len(batch["labels"]) / total
            pair = [share * x for x in losses_of(model, batch, strategy, smoothing)]
            gate.accumulate(pair[0].sum(), pair[1].sum())
            sums = sums + torch.stack(pair).detach()
        decision = gate.combine(max_norm=1.0)
        weights = 0.3 * decision.kept[: len(sums[0])]
        loss = ((1 - weights) * sums[0] + weights * sums[1]).sum().item()
        optimizer.step()
        optimizer.zero_grad()
        found.append({"loss": loss, "angles": decision.angle, "kept": decision.kept})
    return found
