"""Rank functions with a gate in a loop of DistributedDataParallel."""

from __future__ import annotations

from typing import Any

import torch
from fusedacl.engine import GradientGate
from fusedacl.kernels import acl_loss
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(6, 8, dtype=torch.float64)
        self.classes = nn.Linear(8, 3, dtype=torch.float64)
        # Of another dtype: each has a buffer of its own, in the same order on all ranks.
        self.bias = nn.Parameter(torch.zeros(3, dtype=torch.float32))

    def forward(self, x: Tensor, use_bias: bool) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.encoder(x))
        return h, self.classes(h) + (self.bias if use_bias else 0.0)


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Texts of a rank: each rank has fewer than the one before; only the first uses the bias."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    number = 9 - 2 * rank
    labels = torch.randint(0, 3, (number,), generator=generator)
    return torch.randn(number, 6, generator=generator, dtype=torch.float64), labels


def losses(model: nn.Module, classes: nn.Linear, step: int, rank: int) -> tuple[Tensor, Tensor]:
    x, y = batch(step, rank)
    h, logits = model(x, rank == 0)
    return functional.cross_entropy(logits, y), acl_loss(h, y, classes.weight)


def steps_under_ddp(rank: int, options: dict[str, Any], accumulation: int) -> list[list[Tensor]]:
    """Per step: the angle, and the gradient of every parameter."""
    net = Classifier()
    model = DistributedDataParallel(net, **options)
    group = torch.distributed.group.WORLD
    gate = GradientGate(model.parameters(), weight=0.3, process_group=group)
    made = []
    for step in range(2):
        with model.no_sync():
            for micro in range(accumulation):
                gate.accumulate(*losses(model, net.classes, step + 7 * micro, rank))
            decision = gate.combine()
        made.append([decision.angle, *(p.grad.clone() for p in net.parameters())])
        for p in net.parameters():
            p.data -= 0.1 * p.grad
            p.grad = None
    return made
