"""One decision of the gate under DistributedDataParallel, as on the batches of all ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fusedacl.engine import GradientGate
from gate_cases import Classifier, losses, steps_under_ddp
from rank_pool import Ranks
from torch.nn.parallel import DistributedDataParallel


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}])
def test_ranks_decide_together(
    four_ranks: Ranks, options: dict[str, Any], accumulation: int
) -> None:
    of_ranks = four_ranks.run(steps_under_ddp, options, accumulation)
    net = Classifier()
    gate = GradientGate(net.parameters(), weight=0.3)
    for step in range(2):
        for micro in range(accumulation):
            pairs = [losses(net, net.classes, step + 7 * micro, rank) for rank in range(4)]
            main, auxiliary = (torch.stack(kind).mean() for kind in zip(*pairs, strict=True))
            gate.accumulate(main, auxiliary)
        expected = [gate.combine().angle, *(p.grad for p in net.parameters())]
        for made in of_ranks:
            for found, wanted in zip(made[step], expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
            for found, other in zip(made[step], of_ranks[0][step], strict=True):
                assert torch.equal(found, other)
        for p in net.parameters():
            p.data -= 0.1 * p.grad
            p.grad = None


def test_a_scope_of_several_processes_is_refused(four_ranks: Ranks) -> None:
    assert four_ranks.run(refused_scope) == ["scope: with a process_group"] * 4


def refused_scope(rank: int) -> str:
    net = Classifier()
    gate = GradientGate(net.parameters(), process_group=torch.distributed.group.WORLD)
    try:
        gate.backward(*losses(net, net.classes, 0, rank), scope=list(net.parameters()))
    except ValueError as error:
        return str(error).partition(" the angle")[0]
    return "was not refused"


@pytest.mark.parametrize("option", ["find_unused_parameters", "static_graph"])
def test_a_model_that_averages_by_itself_is_refused(four_ranks: Ranks, option: str) -> None:
    for words in four_ranks.run(refused_averaging, option):
        assert "under its no_sync(), and give the gate the process_group" in words


def refused_averaging(rank: int, option: str) -> str:
    net = Classifier()
    model = DistributedDataParallel(net, **{option: True})
    gate = GradientGate(model.parameters(), process_group=torch.distributed.group.WORLD)
    try:
        gate.backward(*losses(model, net.classes, 0, 0))
    except ValueError as error:
        return str(error)
    return "was not refused"
