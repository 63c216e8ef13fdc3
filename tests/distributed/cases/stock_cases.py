"""Rank functions that make two backward passes with plain DeepSpeed."""

from __future__ import annotations

from typing import Any

import deepspeed
import deepspeed.ops
import torch
from deepspeed.utils import safe_get_full_fp32_param
from fusedacl.engine.runtime import processes
from torch import Tensor
from zero_cases import Net, batch


def stock(
    net: torch.nn.Module, stage: int, optimizer: type = torch.optim.SGD, **settings: Any
) -> Any:
    """An engine without fusedacl: SGD with rate 0.1, so that a step shows the gradient."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
    zero = {"stage": stage, "reduce_bucket_size": 10**6, **settings.pop("zero", {})}
    decay = settings.pop("weight_decay", 0.0)
    config = {
        "train_micro_batch_size_per_gpu": 6,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        **settings,
    }
    trained = [p for p in net.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=net, optimizer=optimizer(trained, lr=0.1, weight_decay=decay), config=config
    )
    return engine


def weights(engine: Any, stage: int) -> Tensor:
    values = []
    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            full = parameter if stage == 0 else safe_get_full_fp32_param(parameter)
            values.append(full.detach().float().flatten())
    return torch.cat(values)


def losses(net: Net, step: int = 0) -> tuple[Tensor, Tensor]:
    made = net.losses(*batch(step, processes.rank()), False)
    assert made.auxiliary is not None
    return made.main.sum(), made.auxiliary.sum()


def step_of(stage: int, which: str) -> Tensor:
    """The change of the weights by one step of SGD."""
    net = Net()
    engine = stock(net, stage)
    before = weights(engine, stage).clone()
    main, auxiliary = losses(net)
    if which == "both":
        engine.backward(auxiliary, retain_graph=True)
        engine.backward(main)
    else:
        engine.backward({"main": main, "auxiliary": auxiliary, "sum": main + auxiliary}[which])
    engine.step()
    change = weights(engine, stage) - before
    engine.destroy()
    return change


def two_passes(rank: int, stage: int) -> dict[str, float]:
    """Distance of the step after two backward passes from those after one."""
    both = step_of(stage, "both")
    return {
        which: float((both - step_of(stage, which)).norm() / both.norm())
        for which in ("main", "auxiliary", "sum")
    }


def retained_graph(rank: int) -> str:
    """The error of a second backward pass through one graph under ZeRO 3."""
    net = Net()
    engine = stock(net, 3, zero={"stage3_param_persistence_threshold": 0})
    main, auxiliary = losses(net)
    engine.backward(auxiliary, retain_graph=True)
    try:
        engine.backward(main)
    except RuntimeError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""


def unscaled_step(rank: int) -> float:
    """Under ZeRO 0 in fp16 with a loss scale of 256: the step, as a share of the right one."""
    right = step_of(0, "main").norm()
    net = Net()
    engine = stock(net, 0, fp16={"enabled": True, "loss_scale": 256})
    before = [master.clone() for group in engine.optimizer.fp32_groups for master in group]
    engine.backward(losses(net)[0])
    engine.step()
    after = [master for group in engine.optimizer.fp32_groups for master in group]
    change = torch.cat([(a - b).detach().flatten() for a, b in zip(after, before, strict=True)])
    engine.destroy()
    return float(change.norm() / right)


def left_over(rank: int) -> float:
    """ZeRO 3: how far the projection moves in a step whose loss does not reach it."""
    net = Net()
    engine = stock(net, 3)
    main, auxiliary = losses(net)
    engine.backward(main + auxiliary)
    engine.step()
    before = safe_get_full_fp32_param(net.projection.weight).clone()
    engine.backward(losses(net, 1)[0])
    engine.step()
    moved = float((safe_get_full_fp32_param(net.projection.weight) - before).norm())
    engine.destroy()
    return moved


def growth_step(rank: int, stage: int) -> list[float]:
    """Norms of steps on one batch, from the same weights, while the loss scale grows."""
    net = Net()
    fp16 = {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 2, "hysteresis": 1}
    engine = stock(net, stage, fp16=fp16)
    # So small that the weights, hence the gradients, stay what they are.
    for group in engine.optimizer.param_groups:
        group["lr"] = 1e-4
    made = []
    before = weights(engine, stage).clone()
    for _ in range(6):
        engine.backward(losses(net)[0])
        engine.step()
        after = weights(engine, stage).clone()
        made.append(float((after - before).norm()))
        before = after
    engine.destroy()
    return made


def first_moments(rank: int) -> tuple[float, float]:
    """ZeRO 0 in fp16: steps that AdamW counts, and weight decay done, before the first step."""
    fp16 = {"enabled": True, "loss_scale": 1}
    engine = stock(Net(), 0, torch.optim.AdamW, weight_decay=0.5, fp16=fp16)
    master = engine.optimizer.fp32_groups[0][0]
    counted = float(engine.optimizer.optimizer.state[master]["step"])
    given = engine.optimizer.fp16_groups[0][0].float()
    decayed = float(1 - (master.norm() / given.norm()))
    engine.destroy()
    return counted, decayed
