"""Rank functions for gate scopes: DeepSpeed against one process with the texts of all ranks."""

from __future__ import annotations

from typing import Any

# First: it tells deepspeed to compute on the CPU.
from zero_cases import (
    CPU,
    NUM_STEPS,
    batch,
    compared,
    exits_model,
    options,
    settings_of,
    steps_of,
    weights_of,
)

# isort: split
import torch
from fusedacl.engine import MultiExitForSequenceClassification, TrainingConfig
from fusedacl.engine.backends.deepspeed.backend import DeepSpeedBackend
from fusedacl.engine.backends.local import LocalBackend
from fusedacl.engine.objectives.losses import ExitLosses, exit_losses
from fusedacl.engine.runtime import processes
from torch import Tensor


def losses_of(
    model: MultiExitForSequenceClassification,
    engine: Any,
    config: TrainingConfig,
    batches: list[tuple[Tensor, Tensor]],
) -> ExitLosses:
    """Means over the batches; each is contrasted with itself, all of them are one forward pass."""
    ids = torch.cat([ids for ids, _ in batches])
    with engine.forward_context():
        output = model(input_ids=ids)
    found = []
    for number, (_, labels) in enumerate(batches):
        rows = slice(number * len(labels), (number + 1) * len(labels))
        part = type(output)(
            logits=output.logits[rows],
            exit_logits=output.exit_logits[:, rows],
            exit_embeddings=output.exit_embeddings[:, rows],
        )
        with engine.forward_context():
            found.append(exit_losses(config.objective, part, model.label_embeddings, labels))
    auxiliary = [losses.auxiliary for losses in found if losses.auxiliary is not None]
    return ExitLosses(
        torch.stack([losses.main for losses in found]).mean(0), torch.stack(auxiliary).mean(0)
    )


def sharded(
    model: MultiExitForSequenceClassification, stage: int, config: TrainingConfig
) -> DeepSpeedBackend:
    given: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    if config.optimization.fp16:
        given["fp16"] = {"enabled": True, "initial_scale_power": 12}
    shared = settings_of(model, config)
    return DeepSpeedBackend(model, config, NUM_STEPS, CPU, deepspeed_config=given, **shared)


def compare_scope(
    rank: int, stage: int, scope: str, max_angle: float, dtype: str, exit_head: str
) -> dict[str, Any]:
    """Relative error of the update, decisions and angles, beside the local backend's in float32."""
    world = processes.world_size()
    case = {"accumulation": 1, "max_angle": max_angle, "clip": 0.5}
    changes: dict[str, Any] = {"gate_scope": scope, "impl": "reference"}
    oracle, model = exits_model(exit_head=exit_head), exits_model(exit_head=exit_head)
    first = weights_of(model)
    config = options(case, **changes)
    local = LocalBackend(oracle, config, NUM_STEPS, CPU, **settings_of(oracle, config))
    wanted = []
    for step in range(NUM_STEPS):
        local.backward(losses_of(oracle, local, config, [batch(step, r) for r in range(world)]))
        wanted.append(local.step())
    local.close()

    engine = sharded(model, stage, options(case, **changes, fp16=dtype == "fp16"))
    found = []
    for step in range(NUM_STEPS):
        losses = losses_of(model, engine, config, [batch(step, rank)])
        engine.backward(losses.times(1 / world, 1 / world))
        found.append(engine.step())
    engine.close()
    return compared(first, weights_of(model), weights_of(oracle), found, wanted)


def overflow_scope(rank: int, stage: int) -> list[tuple[float, bool, float]]:
    """Three steps of which the first overflows on one rank, in the contrastive loss."""
    model = exits_model(exit_head="mha")
    config = options({"accumulation": 1}, gate_scope="head", impl="reference", fp16=True)
    engine = sharded(model, stage, config)

    def losses(step: int) -> ExitLosses:
        made = losses_of(model, engine, config, [batch(step, rank)])
        return made.times(0.5, 5e8 if (rank, step) == (1, 1) else 0.5)

    return steps_of(engine, (losses(step) for step in (1, 2, 3)))


def refuse_agreement(rank: int) -> str:
    """The refusal of a run that asks for the exact decision too."""
    config = options({"accumulation": 1}, gate_scope="head", gate_agreement_steps=3)
    try:
        sharded(exits_model(exit_head="mha"), 1, config)
    except ValueError as error:
        return str(error)
    return ""
