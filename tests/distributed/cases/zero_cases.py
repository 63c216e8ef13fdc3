"""Rank functions for ZeRO: a tiny BERT under the DeepSpeed and the local backend."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable
from typing import Any

# Before deepspeed looks for one: these ranks compute on the CPU, also where there is a GPU.
os.environ["DS_ACCELERATOR"] = "cpu"

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from fusedacl.engine import MultiExitConfig, MultiExitForSequenceClassification, TrainingConfig
from fusedacl.engine.backends.deepspeed.backend import DeepSpeedBackend
from fusedacl.engine.backends.local import LocalBackend
from fusedacl.engine.objectives.losses import ExitLosses
from fusedacl.engine.runtime import processes
from fusedacl.kernels import acl_loss, supcon_loss
from torch import Tensor, nn
from transformers import BertConfig, BertModel

CPU = torch.device("cpu")
# torch warns about functions that deepspeed calls.
warnings.filterwarnings("ignore", category=FutureWarning)
# DeepSpeed refuses fp16 on a CPU that has to emulate it, which only costs time.
get_accelerator().is_fp16_supported = lambda: True
NUM_STEPS = 5
# Some of the angles of the steps below are smaller, some larger, by degrees.
MAX_ANGLE = 88.9
ROWS, TOKENS, LABELS = 6, 7, 3


def encoder_config(num_layers: int) -> BertConfig:
    return BertConfig(
        vocab_size=53, hidden_size=24, num_hidden_layers=num_layers, num_attention_heads=2,
        intermediate_size=40, max_position_embeddings=16,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip


def exits_model(**changes: Any) -> MultiExitForSequenceClassification:
    """A model of three layers with exits."""
    torch.manual_seed(0)
    settings = {"num_labels": LABELS, "exit_width": 8, "exit_dropout": 0.0, **changes}
    return MultiExitForSequenceClassification(MultiExitConfig(encoder_config(3), **settings))


class Net(nn.Module):
    """Heads that one loss alone reaches, one that none does, and frozen parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bert = BertModel(encoder_config(2), add_pooling_layer=False)
        self.classifier = nn.Linear(24, LABELS)
        self.projection = nn.Linear(24, 10)
        self.unused = nn.Linear(5, 5)
        self.bert.embeddings.position_embeddings.requires_grad_(False)
        for layer in self.bert.encoder.layer:
            # Attention does not depend on it: its gradient is rounding, which AdamW would blow up.
            layer.attention.self.key.bias.requires_grad_(False)

    def losses(self, ids: Tensor, labels: Tensor, label_rows: bool) -> ExitLosses:
        """label_rows: the contrastive loss takes the classifier's weight, not the projection."""
        hidden = self.bert(input_ids=ids).last_hidden_state[:, 0]
        main = nn.functional.cross_entropy(self.classifier(hidden).float(), labels)
        if label_rows:
            weights = self.classifier.weight.float()
            auxiliary = acl_loss(hidden.float(), labels, weights, impl="reference")
        else:
            rows = self.projection(hidden).float()
            auxiliary = supcon_loss(rows, labels, temperature=0.3, impl="reference")
        return ExitLosses(main[None], auxiliary[None])


def batch(step: int, number: int) -> tuple[Tensor, Tensor]:
    """Micro-batch `number`, over all ranks, of a step."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    ids = torch.randint(0, 53, (ROWS, TOKENS), generator=generator)
    return ids, torch.randint(0, LABELS, (ROWS,), generator=generator)


def options(case: dict[str, Any], **changes: Any) -> TrainingConfig:
    values: dict[str, Any] = {
        "task_name": "quickstart",
        "output_dir": "unused",
        "learning_rate": case.get("learning_rate", 1e-3),
        "aux_weight": 0.3,
        "max_angle": 90.0 if case.get("gate") == "none" else case.get("max_angle", MAX_ANGLE),
        "gate": case.get("gate", "angle"),
        "max_grad_norm": case.get("clip", 0.0),
        "gradient_accumulation_steps": case["accumulation"],
        "per_device_train_batch_size": ROWS,
        "warmup_ratio": 0.2,
        "weight_decay": 0.1,
    }
    return TrainingConfig.create(**values | changes).resolved()


def settings_of(model: nn.Module, config: TrainingConfig, **changes: Any) -> dict[str, Any]:
    """Arguments of both backends: one group of all trained parameters, unless changed."""
    return {
        "groups": {"model": [p for p in model.parameters() if p.requires_grad]},
        "independent": False,
        "learning_rate": config.optimization.learning_rate,
        "gate_scope": config.objective.gate_scope,
        **changes,
    }


def settings_of_case(net: Net, config: TrainingConfig, case: dict[str, Any]) -> dict[str, Any]:
    if not case.get("groups"):
        return settings_of(net, config)
    body = {id(p) for p in net.bert.parameters()}
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = {
        "body": [p for p in trained if id(p) in body],
        "heads": [p for p in trained if id(p) not in body],
    }
    return settings_of(net, config, groups=groups, independent=case.get("independent", False))


def run(
    net: Net,
    engine: Any,
    case: dict[str, Any],
    mine: list[int],
    total: int,
    steps: range = range(NUM_STEPS),
) -> list[Any]:
    """The reports of some steps on the micro-batches `mine` of `total`."""
    reports = []
    for step in steps:
        for number in mine:
            with engine.forward_context():
                losses = net.losses(*batch(step, number), case.get("label_rows", False))
            engine.backward(losses.times(1 / total, 1 / total))
        reports.append(engine.step())
    return reports


def sharded(net: Net, stage: int, case: dict[str, Any]) -> DeepSpeedBackend:
    """The DeepSpeed engine of a case."""
    given: dict[str, Any] = {"zero_optimization": {"stage": stage, **case.get("zero", {})}}
    if case["dtype"] == "fp16":
        given["fp16"] = {"enabled": True, "initial_scale_power": 12, **case.get("fp16", {})}
    precision = {} if case["dtype"] == "fp32" else {case["dtype"]: True}
    config = options(case, **precision)
    shared = settings_of_case(net, config, case)
    return DeepSpeedBackend(net, config, NUM_STEPS, CPU, deepspeed_config=given, **shared)


def compare(rank: int, stage: int, case: dict[str, Any]) -> dict[str, Any]:
    """One run of the DeepSpeed engine beside the local backend's on all ranks' batches, float32."""
    world = processes.world_size()
    total = world * case["accumulation"]
    first, oracle = weights_of(Net()), Net()
    config = options(case)
    local = LocalBackend(oracle, config, NUM_STEPS, CPU, **settings_of_case(oracle, config, case))
    wanted = run(oracle, local, case, list(range(total)), total)

    net = Net()
    engine = sharded(net, stage, case)
    mine = list(range(rank, total, world))
    found = run(net, engine, case, mine, total)
    engine.close()
    final = weights_of(net)
    fixed = [n for n in first if n.startswith("unused") or "position" in n or "key.bias" in n]
    return {
        **compared(first, final, weights_of(oracle), found, wanted),
        "unmoved": max(float((final[n] - first[n]).abs().max()) for n in fixed),
        "dtype": str(final["classifier.weight"].dtype),
    }


def compared(
    first: dict[str, Tensor],
    final: dict[str, Tensor],
    expected: dict[str, Tensor],
    found: list[Any],
    wanted: list[Any],
) -> dict[str, Any]:
    """Relative error of the change of the weights; found and wanted values of all reports."""
    # Attention does not depend on the keys' biases: their gradients are rounding, which AdamW
    # blows up.
    seen = [name for name in first if not name.endswith(("key.bias", "key_value.bias"))]
    error = torch.cat([(final[n] - expected[n]).double().flatten() for n in seen]).norm()
    moved = torch.cat([(expected[n] - first[n]).double().flatten() for n in seen]).norm()
    reports = list(zip(found, wanted, strict=True))
    made: dict[str, Any] = {
        "error": float(error / moved),
        "norms": [(float(f.grad_norm), float(w.grad_norm)) for f, w in reports],
        "rates": [(f.learning_rate, w.learning_rate) for f, w in reports],
        "skipped": [f.skipped for f in found],
    }
    if found[0].decision is not None:
        both = [(f.decision, w.decision) for f, w in reports]
        for name, value in (("kept", "kept"), ("angles", "angle"), ("active", "active")):
            made[name] = [(getattr(f, value).tolist(), getattr(w, value).tolist()) for f, w in both]
    return made


def weights_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def resume(rank: int, stage: int, case: dict[str, Any]) -> dict[str, Any]:
    """Two steps, a new engine from what they left, the other steps; beside no interruption."""
    world = processes.world_size()
    mine, total = [rank], world
    whole, interrupted = Net(), Net()
    engine = sharded(whole, stage, case)
    run(whole, engine, case, mine, total)
    engine.close()

    engine = sharded(interrupted, stage, case)
    run(interrupted, engine, case, mine, total, range(2))
    state = copy.deepcopy(engine.state_dict())
    weights = engine.full_state_dict()
    engine.close()
    resumed = Net()
    resumed.load_state_dict(weights)
    engine = sharded(resumed, stage, case)
    engine.load_state_dict(state)
    run(resumed, engine, case, mine, total, range(2, NUM_STEPS))
    engine.close()
    final, expected = weights_of(resumed), weights_of(whole)
    problem = ""
    try:
        sharded(Net(), (stage + 1) % 4, case).load_state_dict(state)
    except ValueError as error:
        problem = str(error)
    return {
        "error": max(float((final[n] - expected[n]).abs().max()) for n in final),
        "moved": max(float((final[n] - weights[n]).abs().max()) for n in final),
        "problem": problem,
    }


def overflow(rank: int, stage: int, zero: dict[str, Any]) -> list[tuple[float, bool, float]]:
    """Loss scale, skipped, and the largest weight change of each step, the first scales too big."""
    case = {"dtype": "fp16", "accumulation": 1, "fp16": {"initial_scale_power": 16}}
    case["zero"] = zero
    net = Net()
    engine = sharded(net, stage, case)

    def losses(step: int) -> ExitLosses:
        with engine.forward_context():
            made = net.losses(*batch(step, rank), False)
        # The scale is too big on one rank only, for one of the losses only.
        return made.times(0.5, 2.0 if rank == 1 else 0.5)

    return steps_of(engine, (losses(step) for step in range(1, 10)))


def steps_of(engine: Any, losses: Iterable[ExitLosses]) -> list[tuple[float, bool, float]]:
    """Loss scale, skipped, and the largest weight change of a step for each of the losses."""
    made, before = [], engine.full_state_dict()
    for of_step in losses:
        engine.backward(of_step)
        report = engine.step()
        after = engine.full_state_dict()
        moved = max(float((after[n] - before[n]).abs().max()) for n in after)
        made.append((report.loss_scale, report.skipped, moved))
        before = after
    engine.close()
    return made


def not_a_number(rank: int, stage: int) -> str:
    """The error on this rank after a NaN on rank 1, without float16."""
    net = Net()
    engine = sharded(net, stage, {"dtype": "fp32", "accumulation": 1})
    losses = net.losses(*batch(0, rank), False)
    scaled = losses.main * (torch.nan if rank == 1 else 1.0)
    engine.backward(ExitLosses(scaled, losses.auxiliary).times(0.5, 0.5))
    try:
        engine.step()
    except FloatingPointError as error:
        return str(error)
    return ""


def check_reports(made: dict[str, Any], bar: float, degrees: float) -> None:
    """Check what `compared` has found against bounds of the relative error and of the angles'."""
    assert made["error"] <= bar
    assert not any(made["skipped"])
    for found, wanted in made["rates"]:
        assert found == pytest.approx(wanted)
    for found, wanted in made["norms"]:
        assert found == pytest.approx(wanted, rel=max(2 * bar, 1e-5))
    for found, wanted in made.get("angles", []):
        assert found == pytest.approx(wanted, abs=degrees)
    for found, wanted in [*made.get("kept", []), *made.get("active", [])]:
        assert found == wanted
