"""Ranks that train a model with exits as the trainer does: stages, groups, cached batches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from fusedacl.engine import MultiExitConfig, MultiExitForSequenceClassification
from fusedacl.engine.backends.deepspeed.backend import DeepSpeedBackend
from fusedacl.engine.backends.local import LocalBackend
from fusedacl.engine.objectives.large_batches import Chunk, cached_losses
from fusedacl.engine.runtime import processes
from fusedacl.engine.training.stages import Stage, plan_stages, prepare, stage_outputs
from torch import Tensor
from transformers import BertConfig
from zero_cases import CPU, LABELS, batch, options, settings_of

NUM_STEPS = 4


def new_model() -> MultiExitForSequenceClassification:
    torch.manual_seed(0)
    encoder = BertConfig(
        vocab_size=53, hidden_size=24, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=40, max_position_embeddings=16,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config = MultiExitConfig(
        encoder, exit_layers=[1, 2, 3], exit_head="mha", exit_width=8, exit_attention_heads=2,
        num_labels=LABELS, exit_dropout=0.0,
    )  # fmt: skip
    return MultiExitForSequenceClassification(config)


def forward(
    model: MultiExitForSequenceClassification,
    engine: Any,
    stage: Stage,
    positions: Sequence[int],
    ids: Tensor,
    labels: Tensor,
) -> Chunk:
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with engine.forward_context():
        output, teacher = stage_outputs(model, stage, positions, inputs)
    return Chunk(output, labels, teacher)


def train(
    model: MultiExitForSequenceClassification,
    engine: Any,
    config: Any,
    stage: Stage,
    batches: list[list[int]],
    share: float,
) -> list[Any]:
    """Steps over contrastive batches, each of several forward passes, as `Trainer` makes them."""
    reports = []
    for step in range(NUM_STEPS):
        positions = stage.exits_in_epoch(1 + step // 2)
        for numbers in batches:
            forwards = [
                partial(forward, model, engine, stage, positions, *batch(step, number))
                for number in numbers
            ]
            for losses in cached_losses(
                forwards,
                partial(model.label_embeddings_of, positions),
                config.objective,
                shares=[share] * len(forwards),
                weight=share * len(forwards),
                loss_scale=engine.loss_scale,
                device=CPU,
                context=engine.forward_context,
            ):
                engine.backward(losses)
        reports.append(engine.step())
    return reports


def compare_exits(rank: int, zero: dict[str, Any], strategy: str, together: int) -> dict[str, Any]:
    """Relative error of the update, decisions and angles, beside the local backend's."""
    world = processes.world_size()
    case = {"accumulation": 2, "max_angle": 90.0, "clip": 1.0}
    changes = {"strategy": strategy, "impl": "reference"}
    if together == 2:
        changes["contrastive_batch_size"] = 12
    config = options(case, **changes)
    stage = plan_stages(config, 3)[-1]
    share = 1 / (2 * world)

    def of_rank(number: int) -> list[list[int]]:
        numbers = [2 * number, 2 * number + 1]
        return [numbers] if together == 2 else [[n] for n in numbers]

    oracle, model = new_model(), new_model()
    first = {name: p.detach().clone() for name, p in model.named_parameters()}

    def settings(of: MultiExitForSequenceClassification) -> dict[str, Any]:
        groups, independent = prepare(of, stage), not stage.trains_backbone
        return settings_of(of, config, groups=groups, independent=independent)

    local = LocalBackend(oracle, config, NUM_STEPS, CPU, **settings(oracle))
    everything = [numbers for r in range(world) for numbers in of_rank(r)]
    wanted = train(oracle, local, config, stage, everything, share)
    given = {"zero_optimization": zero}
    engine = DeepSpeedBackend(
        model, config, NUM_STEPS, CPU, deepspeed_config=given, **settings(model)
    )
    found = train(model, engine, config, stage, of_rank(rank), share)
    saved = engine.full_state_dict()
    engine.close()
    final, expected = dict(model.named_parameters()), dict(oracle.named_parameters())
    # Attention does not depend on the keys' biases: their gradients are rounding, which AdamW
    # blows up.
    seen = [name for name in first if not name.endswith(("key.bias", "key_value.bias"))]
    error = torch.cat([(final[n] - expected[n]).detach().flatten() for n in seen]).norm()
    moved = torch.cat([(expected[n] - first[n]).detach().flatten() for n in seen]).norm()
    # The closed model is an ordinary one: it computes and trains without DeepSpeed.
    ids, labels = batch(0, 0)
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    return {
        "error": float(error / moved),
        "kept": [(f.decision.kept.tolist(), w.decision.kept.tolist())
                 for f, w in zip(found, wanted, strict=True)],
        "active": [(f.decision.active.tolist(), w.decision.active.tolist())
                   for f, w in zip(found, wanted, strict=True)],
        "angles": [(f.decision.angle.tolist(), w.decision.angle.tolist())
                   for f, w in zip(found, wanted, strict=True)],
        "changed": [n for n, p in model.state_dict().items() if not torch.equal(saved[n], p)],
        "not_plain": [n for n, m in model.named_modules()
                      if type(m._parameters) is not type(torch.nn.Module()._parameters)],
        "loss": float(loss),
    }  # fmt: skip
