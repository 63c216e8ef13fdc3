"""Cases of `counts`: training steps of the local backend, and inference with early exits.

A BERT of six narrow layers, with an exit on each layer in the cases of several exits, and texts of
one length. The counts do not depend on the weights.
"""

import json
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ...engine.config.training import TrainingConfig
from ...engine.inference.logits import predict_logits
from ...engine.model.early_exit import EarlyExit
from ...engine.model.exit_policies import ExitReading, MaximumProbability, Memory, Policy
from ...engine.model.multi_exit import MultiExitForSequenceClassification
from ...engine.objectives.gate import GradientGate
from ...engine.training.storage.checkpoint import save_model
from ..suites.exits.second_stage import SteppedTrainer
from .kernel_cases import Case, Subject, no_compiled_loop, no_interpreter

NUM_LAYERS = 6
NUM_TOKENS = 24
BATCH_SIZE = 8
CHUNKS = 2
WORDS = "the old new red dog cat bird house runs sleeps eats sings good bad".split()
# No branch may depend on rounding: every gradient is clipped and every angle is accepted.
CE: dict[str, Any] = {"objective": "ce", "max_grad_norm": 1e-4}
ACL: dict[str, Any] = {**CE, "objective": "acl", "max_angle": 180.0}
STEPS: dict[str, dict[str, Any]] = {
    "ce": CE,
    "ce + scl": {**CE, "objective": "scl"},
    "acl, no gate": {**CE, "objective": "acl", "gate": "none"},
    "acl": ACL,
    "acl, gate_scope top:1": {**ACL, "gate_scope": "top:1"},
    "acl, gate_scope head": {**ACL, "gate_scope": "head"},
    "acl, logged": {**ACL, "logging_steps": 1},
    "acl, bf16": {**ACL, "bf16": True},
    f"acl, {CHUNKS} micro-batches": {**ACL, "gradient_accumulation_steps": CHUNKS},
    f"acl, cached batch of {CHUNKS} chunks": {
        **ACL,
        "gradient_accumulation_steps": CHUNKS,
        "contrastive_batch_size": CHUNKS * BATCH_SIZE,
    },
    f"joint, acl, {NUM_LAYERS} exits": {
        **ACL,
        "strategy": "joint",
        "num_hidden_layers": NUM_LAYERS,
    },
}
# Steps of a single exit need fewer layers.
FEWER_LAYERS = {"num_hidden_layers": NUM_LAYERS // 2}
STAGE2_EXITS = f"{NUM_LAYERS - 1} exits"
STAGE2: dict[str, dict[str, Any]] = {
    "acl": ACL,
    "ce": CE,
    "acl, from the cache": {**ACL, "feature_cache": "features"},
}


@dataclass(frozen=True)
class Halves(Policy):
    """Half of the texts that reach an exit leave there, whatever its logits."""

    name = "halves"

    def leaves(self, reading: ExitReading, memory: Memory) -> tuple[Tensor, Memory]:
        places = torch.arange(len(reading.logits), device=reading.logits.device)
        return places < len(places) // 2, memory


POLICIES: dict[str, Policy] = {
    "all leave at once": MaximumProbability(threshold=0.0),
    "half leave at each exit": Halves(),
    f"all {NUM_LAYERS} exits": MaximumProbability(threshold=1.0),
}


def model_cases() -> list[Case]:
    return [
        *(
            Case(f"step: {name}", partial(_step, FEWER_LAYERS | options), no_compiled_loop)
            for name, options in STEPS.items()
        ),
        Case("gate tiled", partial(_gate, "tiled"), no_compiled_loop),
        Case("gate triton", partial(_gate, "triton"), no_interpreter),
        *(
            Case(f"stage 2, {STAGE2_EXITS}: {name}", partial(_stage2, options), no_compiled_loop)
            for name, options in STAGE2.items()
        ),
        *(
            Case(f"early exit: {name}", partial(_early_exit, policy))
            for name, policy in POLICIES.items()
        ),
        Case("early exit: half leave, repacked", _repacked),
        Case("evaluation of one batch", _evaluation),
    ]


def _step(options: dict[str, Any], directory: Path) -> Subject:
    """A step of a run; the first call creates the optimizer state."""
    trainer = _trainer(directory, **options)
    return Subject(trainer.one_step, _parts(trainer.model))


def _gate(impl: str, directory: Path) -> Subject:
    """Two trivial backward passes over a model's parameters, and the gate's decision."""
    shapes = [p.shape for p in _trainer(directory, **ACL).model.parameters()]
    parameters = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    gate = GradientGate(parameters, max_angle=180.0, impl=impl)

    def call() -> None:
        losses = (torch.stack([p.pow(n).sum() for p in parameters]).sum() for n in (2, 3))
        gate.accumulate(*losses)
        gate.combine(loss_scale=2.0, max_norm=1e-4)
        for parameter in parameters:
            parameter.grad = None

    return Subject(call)


def _stage2(options: dict[str, Any], directory: Path) -> Subject:
    stage1 = directory / "stage1"
    if not stage1.exists():
        first = _trainer(directory, **ACL, strategy="single")
        save_model(stage1, first.model, first.tokenizer)
    if "feature_cache" in options:
        options = options | {"feature_cache": str(directory / options["feature_cache"])}
    return _step({**options, "strategy": "two_stage", "stage1_model": str(stage1)}, directory)


def _early_exit(policy: Policy, directory: Path) -> Subject:
    trainer = _trainer(directory, **ACL, strategy="joint")
    tokens = torch.randint(5, len(WORDS), (2 * BATCH_SIZE, NUM_TOKENS))
    return Subject(partial(EarlyExit(trainer.model, policy), tokens), _parts(trainer.model))


def _repacked(directory: Path) -> Subject:
    trainer = _trainer(directory, **ACL, strategy="joint")
    texts = trainer.train_split.take(np.arange(4 * BATCH_SIZE))
    predict = partial(EarlyExit(trainer.model, Halves()).predict, repack=True)
    return Subject(partial(predict, texts, BATCH_SIZE, pad_token_id=0), _parts(trainer.model))


def _evaluation(directory: Path) -> Subject:
    trainer = _trainer(directory, **ACL, strategy="joint")
    texts = trainer.train_split.take(np.arange(BATCH_SIZE))
    call = partial(predict_logits, trainer.model, texts, BATCH_SIZE, pad_token_id=0)
    return Subject(call, _parts(trainer.model))


def _parts(model: MultiExitForSequenceClassification) -> dict[str, list[nn.Module]]:
    backbone = cast(Any, model.backbone)
    layers = list(backbone.encoder.layer)
    return {"backbone": [backbone], "layers": layers, "exits": list(model.exits)}


def _trainer(directory: Path, **options: Any) -> SteppedTrainer:
    encoder, texts = directory / "encoder", directory / "train.jsonl"
    if not encoder.exists():
        _write_encoder(encoder)
        _write_texts(texts, 16 * BATCH_SIZE)
    settings: dict[str, Any] = {
        "train_file": str(texts),
        "max_seq_length": NUM_TOKENS,
        "per_device_train_batch_size": BATCH_SIZE,
        "output_dir": tempfile.mkdtemp(prefix="run-", dir=directory),
        "logging_steps": 1000,
        "save_steps": 0,
        "disable_tqdm": True,
        "device": "cpu",
    }
    if "stage1_model" not in options:
        settings["model_name_or_path"] = str(encoder)
    return SteppedTrainer(TrainingConfig.create(**settings | options))


def _write_encoder(directory: Path) -> None:
    """Write a random BERT with its tokenizer, in the layout of the hub."""
    import transformers
    from transformers import BertConfig, BertModel

    directory.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (directory / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    # transformers creates this name on access, so type checkers do not find it.
    cast(Any, transformers).BertTokenizerFast.from_pretrained(directory).save_pretrained(directory)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=NUM_TOKENS,
    )
    BertModel(config).save_pretrained(directory)


def _write_texts(file: Path, num_texts: int) -> None:
    """Write texts of two classes; every text has NUM_TOKENS tokens."""
    with file.open("w", encoding="utf-8") as lines:
        for row in range(num_texts):
            words = [WORDS[(row + place) % len(WORDS)] for place in range(NUM_TOKENS)]
            text = {"sentence": " ".join(words), "label": ("no", "yes")[row % 2]}
            lines.write(json.dumps(text) + "\n")
