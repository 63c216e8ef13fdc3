"""The model predicts the bytes that ranks send; wrong losses, silent ranks and lost bytes fail."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fusedacl.benchmarks import cli
from fusedacl.benchmarks.measuring.result_file import read_result
from fusedacl.benchmarks.options import ScalingConfig
from fusedacl.benchmarks.pages.performance import modelled, read_directories
from fusedacl.benchmarks.suites.scaling import cost_model, loopback
from fusedacl.benchmarks.suites.scaling import ranks as scaling_ranks
from fusedacl.benchmarks.suites.scaling import suite as scaling
from fusedacl.benchmarks.suites.scaling.cost_model import METHODS, Link, Machine, Problem
from fusedacl.benchmarks.suites.suite import WrongResult
from fusedacl.engine.config.fields import build
from fusedacl.kernels import acl_loss
from fusedacl.kernels.contrastive.sharded import agreement
from fusedacl.kernels.contrastive.tiled.loss import block_pairs
from torch import Tensor, distributed

SMALL = Problem(num_ranks=2, num_samples=3, num_labels=2, width=4, element_bytes=4)


@pytest.fixture
def single_rank() -> Iterator[None]:
    """A group of this process alone."""
    store = distributed.TCPStore(loopback.LOOPBACK, 0, is_master=True, wait_for_workers=False)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


# Counted by hand. N = 3, d = 4, float32: a block has 48 bytes, its labels 24; m = 5 own rows of
# M = 8 and 14. Of ours: a description of 520 bytes, labels, block, 5 sums of 4 bytes.
@pytest.mark.parametrize(
    ("method", "num_ranks", "messages", "sent_bytes", "flops"),
    [
        ("ours", 2, 3, 520 + 24 + 48 + 20, 6 * 5 * 8 * 4),
        ("ours", 4, 9, 3 * (520 + 24 + 48 + 20), 6 * 5 * 14 * 4),
        ("gather_all", 2, 3, 24 + 48 + 48, 6 * 8 * 8 * 4),
        ("gather_all", 4, 9, 3 * (24 + 48 + 48), 6 * 14 * 14 * 4),
        ("gather_rows", 2, 3, 24 + 48 + 48, 6 * 5 * 8 * 4),
        ("gather_rows", 4, 9, 3 * (24 + 48 + 48), 6 * 5 * 14 * 4),
        ("ring", 2, 5, 24 + 2 * 48 + 2 * 48, 8 * 5 * 8 * 4),
        ("ring", 4, 13, 3 * (24 + 2 * 48) + 4 * 48, 8 * 5 * 14 * 4),
    ],
)
def test_hand_counts(
    method: str, num_ranks: int, messages: int, sent_bytes: int, flops: int
) -> None:
    cost = METHODS[method](replace(SMALL, num_ranks=num_ranks)).total
    assert (cost.messages, cost.sent_bytes, cost.flops) == (messages, sent_bytes, flops)


@pytest.mark.parametrize("method", METHODS)
def test_a_single_rank_sends_nothing(method: str) -> None:
    cost = METHODS[method](replace(SMALL, num_ranks=1)).total
    assert (cost.messages, cost.sent_bytes) == (0, 0)


@pytest.mark.parametrize(("num_ranks", "num_samples", "tile"), [(1, 9, 4), (3, 9, 4), (2, 3, 8)])
def test_pairs_of_ours_are_the_tiles(num_ranks: int, num_samples: int, tile: int) -> None:
    problem = Problem(num_ranks, num_samples, 2, 4, 4, tile)
    pairs = block_pairs(problem.num_own_rows, problem.num_rows, tile)
    computed = sum((i.stop - i.start) * (j.stop - j.start) for i, j in pairs)
    assert cost_model.computed_pairs(problem) == computed


def test_seconds_of_a_phase() -> None:
    link = Link(seconds_per_message=1.0, bytes_per_second=10.0)
    machine = Machine(
        "m", 100.0, 5.0, 1e9, replace(link, seconds_per_message=0.0), link, 2, False, False, ""
    )
    cost = cost_model.Cost((cost_model.Phase(3, 20, 200, 10),), 0, can_overlap=True)
    assert machine.seconds(cost, num_ranks=4) == 3 + 2 + 2 + 2
    assert machine.seconds(cost, num_ranks=2) == 2 + 2 + 2
    overlapping = replace(machine, overlaps_messages=True, overlaps_units=True)
    assert overlapping.seconds(cost, num_ranks=4) == 5
    assert overlapping.seconds(replace(cost, can_overlap=False), num_ranks=4) == 5 + 2


def test_overlap_does_not_pay_for_what_a_ring_adds() -> None:
    """C + 3 F against max(C, F) + max(3 C, 3 F): never less where products are the work."""
    closest = float("inf")
    for exponent in range(-12, 13):
        link = Link(0.0, 2.0**exponent)
        machine = Machine("m", 1024.0, 1e30, 1e30, link, link, 1, True, True, "")
        # So wide that labels and sums do not count beside a block.
        problem = Problem(2, 64, 1, 2**20, 2)
        rows = cost_model.modelled(machine, problem, budget_bytes=1e30)["rows"]
        times = cost_model.relative_times(rows, "ring")
        closest = min(closest, *times.values())
    assert closest > 0.99
    assert closest < 1.1


def test_crossover_is_the_first() -> None:
    memory = [METHODS["ours"](replace(SMALL, num_ranks=n)).memory_bytes for n in range(1, 100)]
    limit = memory[36]
    first = next(ranks for ranks, needed in enumerate(memory, 1) if needed > limit)
    assert cost_model.ranks_beyond("ours", SMALL, limit) == first == 38
    assert cost_model.ranks_beyond("ring", SMALL, limit) is None


def test_a_wrong_loss_is_refused(single_rank: None) -> None:
    inputs = scaling_ranks.own_inputs(0, 9, 3, 8)
    scaling_ranks.check(scaling_ranks.losses(), inputs)

    def without_labels(x: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        return acl_loss(x, labels, rows.detach()) + 0 * rows.sum()

    with pytest.raises(AssertionError, match="shortened: .* label embeddings' gradient is 1.0e"):
        scaling_ranks.check({"shortened": without_labels}, inputs)


def test_what_is_not_counted_raises(single_rank: None) -> None:
    original = distributed.all_reduce
    received, sent = torch.empty(3), torch.zeros(3)
    with loopback.Wire() as wire:
        agreement.all_gather(received, sent, distributed.group.WORLD)
        with pytest.raises(NotImplementedError, match="all_reduce is not counted"):
            distributed.all_reduce(sent)
    assert (wire.messages, wire.sent_bytes) == (0, 0)
    assert distributed.all_reduce is original


def end(rank: int) -> None:
    os._exit(3)


@pytest.mark.parametrize(
    ("function", "arguments", "num_ranks", "seconds", "message"),
    [
        (end, (), 2, 0, r"ranks \[0, 1\] gave no answer within 0 seconds"),
        (end, (), 1, 120, "rank 0 of 1: process 0 terminated with exit code 3"),
        # There is no label to draw.
        (scaling_ranks.own_inputs, (3, -1, 8), 1, 120, "rank 0 of 1: (?s:.*)random_ expects"),
    ],
)
def test_silent_and_failed_ranks_are_named_and_none_is_left(
    function: Any, arguments: Any, num_ranks: int, seconds: float, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        loopback.run_ranks(function, num_ranks, *arguments, seconds=seconds)
    assert not multiprocessing.active_children()


OTHER_MACHINE = {
    "matrix_tflops": 312, "giga_exponentials": 3000, "memory_gb": 80, "message_us": 5,
    "link_gb_s": 25, "ranks_per_node": 8, "node_message_us": 3, "node_link_gb_s": 300,
}  # fmt: skip


def test_the_model_predicts_what_two_ranks_send(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole command, tiny: bytes, the files that it writes, and the pages made from them."""
    options = {
        "world_sizes": 2, "num_samples": 6, "num_labels": 3, "width": 8, "rounds": 1,
        "timeout": 200, "output_dir": tmp_path, **OTHER_MACHINE,
    }  # fmt: skip
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    assert cli.main(["scaling", *(f"--{name}={value}" for name, value in options.items())]) == 0
    result = read_result(tmp_path / "scaling.json")
    (measured,) = result["measured"]
    for name, method in METHODS.items():
        cost, found = method(Problem(2, 6, 3, 8, 4)).total, measured["methods"][name]
        assert found["sent_bytes"] == found["received_bytes"] == cost.sent_bytes
        assert found["messages"] == cost.messages
        if found["loopback_bytes"] is not None:
            # The interface also counts headers and barriers.
            assert found["loopback_bytes"] >= cost.sent_bytes
    assert [model["preset"] for model in result["models"]] == ["cpu_loopback", "options"]
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "2 ranks:" in printed and "the machine of the options (numbers given" in printed
    text = modelled(read_directories([tmp_path]), tmp_path)
    assert "the machine of the options (numbers given as options, not measured); " in text
    assert "312,000.0 GFLOP/s, 3,000.00 Gexp/s, alpha 5 us, beta 25,000 MB/s:" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**OTHER_MACHINE, "message_us": None}, "also needs --message_us"),
        ({"world_sizes": "2,1"}, "write ascending numbers"),
        ({"world_sizes": "1"}, "the model needs the link between ranks"),
        ({"world_sizes": "1,x"}, "'x' is not a whole number above 0"),
        ({"width": 0}, "width=0 is out of range"),
        ({"link_gb_s": "nan"}, "link_gb_s: expected float"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config = build(ScalingConfig, options)
        config.described_machine(config.problem_and_ranks()[0])


def test_options_describe_another_machine() -> None:
    config = build(ScalingConfig, {**OTHER_MACHINE, "overlap": False, "width": 64})
    problem, ranks = config.problem_and_ranks()
    assert (problem.width, problem.num_samples, ranks.world_sizes) == (64, 512, (1, 2, 4))
    machine, at = config.described_machine(problem) or (None, None)
    assert machine is not None and at is not None
    assert machine.link(8) == Link(3e-6, 300e9)
    assert machine.link(9) == Link(5e-6, 25e9)
    assert (machine.flops_per_second, machine.memory_bytes) == (312e12, 80e9)
    assert not machine.overlaps_messages and at.element_bytes == at.tile_bytes == 2
    config = build(ScalingConfig, {"preset": "quick", "memory_budget_gb": 2})
    assert config.described_machine(problem) is None
    assert config.problem_and_ranks()[0].width == 32


def test_bytes_that_the_model_misses_are_refused() -> None:
    scaling.check_bytes("ours", 2, 1000, 1049)
    with pytest.raises(WrongResult, match="ours, 2 ranks: 0 bytes were sent but the model pred"):
        scaling.check_bytes("ours", 2, 0, 612)
