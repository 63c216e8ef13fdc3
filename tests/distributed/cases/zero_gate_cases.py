"""Rank functions with `ZeroGate` in a loop of one's own, and the same loop on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

# First, because it chooses the accelerator before deepspeed does.
from zero_cases import Net, batch, weights_of  # isort: skip
import deepspeed
import deepspeed.ops
from example_cases import run_script
from fusedacl.engine import GradientGate, ZeroGate
from fusedacl.engine.runtime import processes
from fusedacl.kernels import acl_loss
from torch import Tensor
from torch.nn import functional

STEPS, WEIGHT = 4, 0.3
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Model(Net):
    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Representations, logits, and the label embeddings, which ZeRO 3 frees after this."""
        hidden = self.bert(input_ids=ids).last_hidden_state[:, 0]
        return hidden, self.classifier(hidden), self.classifier.weight * 1.0


def losses(model: Any, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    hidden, logits, label_embeddings = model(ids)
    auxiliary = acl_loss(hidden, labels, label_embeddings, temperature=0.3)
    return functional.cross_entropy(logits.float(), labels), auxiliary


def optimizer_of(model: torch.nn.Module, case: dict[str, Any]) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    # In half precision DeepSpeed without ZeRO takes a step when it is made, which would decay.
    decay = 0.1 if case["dtype"] == "fp32" else 0.0
    return torch.optim.SGD(trained, lr=0.3, weight_decay=decay)


def group_of(model: torch.nn.Module) -> list[int]:
    """The encoder and the heads decide apart."""
    named = [name for name, p in model.named_parameters() if p.requires_grad]
    return [0 if name.startswith("bert") else 1 for name in named]


def on_one_process(
    case: dict[str, Any], world: int, max_angle: float
) -> tuple[list[Any], dict[str, Tensor]]:
    """Decisions and final weights of plain steps on the batches of all ranks."""
    model = Model()
    optimizer = optimizer_of(model, case)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = group_of(model) if case.get("groups") else None
    gate = GradientGate(trained, weight=WEIGHT, max_angle=max_angle, groups=groups)
    total = world * case["accumulation"]
    made = []
    for step in range(STEPS):
        for number in range(total):
            main, auxiliary = losses(model, *batch(step, number))
            gate.accumulate(main / total, auxiliary / total)
        made.append(gate.combine(max_norm=case["clip"] or None))
        optimizer.step()
        optimizer.zero_grad()
    return made, weights_of(model)


def engine_of(stage: int, case: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = Model()
    if "reentrant" in case:
        again = {"use_reentrant": case["reentrant"]}
        model.bert.gradient_checkpointing_enable(gradient_checkpointing_kwargs=again)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 6,
        "gradient_accumulation_steps": case["accumulation"],
        "gradient_clipping": case["clip"],
        "zero_optimization": {"stage": stage, **case.get("zero", {})},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **case.get("config", {}),
    }
    if case["dtype"] != "fp32":
        config[case["dtype"]] = {"enabled": True, **case.get("precision", {})}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer_of(model, case), config=config
    )
    return engine


def compare_gate(rank: int, stage: int, case: dict[str, Any]) -> dict[str, Any]:
    world, accumulation = processes.world_size(), case["accumulation"]
    max_angle = 180.0
    if case["dtype"] == "fp32":
        # Some angles of the steps are smaller, some larger.
        free, _ = on_one_process(case, world, max_angle)
        max_angle = float(free[0].angle.mean()) + (0.0 if case.get("groups") else 0.4)
    wanted, expected = on_one_process(case, world, max_angle)
    engine = engine_of(stage, case)
    groups = group_of(engine.module) if case.get("groups") else None
    gate = ZeroGate(engine, weight=WEIGHT, max_angle=max_angle, groups=groups)
    first = gate.gradients.full_state_dict({})
    found, scales = [], []
    for step in range(STEPS):
        for micro in range(accumulation):
            gate.backward(*losses(engine, *batch(step, rank + world * micro)))
            scales.append(float(getattr(engine.optimizer, "loss_scale", 1.0)))
            decision = gate.step()
            assert (decision is None) == (micro < accumulation - 1)
        found.append(decision)
    weights = gate.gradients.full_state_dict({})
    error = torch.cat([(weights[n] - expected[n]).flatten() for n in expected]).norm()
    moved = torch.cat([(expected[n] - first[n]).flatten() for n in expected]).norm()
    steps = (engine.global_steps, engine.micro_steps)
    gate.close()
    engine.destroy()
    return {
        "error": float(error / moved),
        "unmoved": max(
            float((weights[n] - first[n]).abs().max()) for n in first if n.startswith("unused")
        ),
        "steps": steps,
        "scales": scales,
        **{
            name: [(getattr(f, name).tolist(), getattr(w, name).tolist()) for f, w in pairs]
            for pairs in [list(zip(found, wanted, strict=True))]
            for name in ("angle", "kept", "grad_norm", "finite")
        },
    }


def overflow_of_one_loss(rank: int, stage: int) -> list[tuple[bool, float, float]]:
    """Finite, the next loss scale and the largest change of a weight, per step."""
    precision = {"initial_scale_power": 8, "hysteresis": 1}
    engine = engine_of(
        stage, {"accumulation": 1, "clip": 0.0, "dtype": "fp16", "precision": precision}
    )
    gate = ZeroGate(engine, weight=WEIGHT)
    made, before = [], gate.gradients.full_state_dict({})
    for step in range(3):
        main, auxiliary = losses(engine, *batch(step, rank))
        # Too large on one rank only.
        gate.backward(main, auxiliary * (1e6 if rank == 1 and step == 1 else 1e-3))
        decision = gate.step()
        after = gate.gradients.full_state_dict({})
        moved = max(float((after[n] - before[n]).abs().max()) for n in after)
        made.append((bool(decision.finite), float(engine.optimizer.loss_scale), moved))
        before = after
    gate.close()
    engine.destroy()
    return made


def refusals(rank: int) -> list[str]:
    """Messages about calls that would lose a gradient, and about unknown engines."""
    case: dict[str, Any] = {"accumulation": 1, "clip": 0.0, "dtype": "fp32"}
    engine = engine_of(2, case)
    gate = ZeroGate(engine)
    main, _ = losses(engine, *batch(0, rank))
    said = []
    for call in (
        lambda: engine.backward(main),
        lambda: engine.step(),
        lambda: gate.step(),
        lambda: ZeroGate(engine),
        lambda: ZeroGate(engine.module),
    ):
        try:
            call()
        except (RuntimeError, ValueError) as error:
            said.append(str(error))
    gate.close()
    # It is the engine's own loop again.
    before = engine.global_steps
    engine.backward(losses(engine, *batch(0, rank))[0])
    engine.step()
    assert engine.global_steps == before + 1
    engine.destroy()
    engine = engine_of(0, case | {"reentrant": True})
    gate = ZeroGate(engine)
    try:
        gate.backward(*losses(engine, *batch(0, rank)))
    except ValueError as error:
        said.append(str(error))
    gate.close()
    engine.destroy()
    for changes in (
        {"zero": {"stage": 3, "zero_quantized_gradients": True}},
        {"config": {"data_types": {"grad_accum_dtype": "fp32"}}, "dtype": "bf16", "stage": 1},
    ):
        engine = engine_of(int(changes.pop("stage", 3)), case | changes)
        try:
            ZeroGate(engine)
        except ValueError as error:
            said.append(str(error))
        engine.destroy()
    for settings in ({"weight": 2.0}, {"max_angle": 200.0}, {"groups": [0]}):
        engine = engine_of(0, case)
        try:
            ZeroGate(engine, **settings)
        except ValueError as error:
            said.append(str(error))
        engine.destroy()
    return said


def run_zero_script(rank: int, path: Path, arguments: list[str]) -> str:
    """The output of a script with a DeepSpeed engine on this rank."""
    return run_script(path, arguments)
