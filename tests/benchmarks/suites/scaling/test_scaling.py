"""The model counts what the ranks send; a wrong loss, a silent rank or a missed byte is refused."""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fusedacl.benchmarks.pages.performance import page
from fusedacl.benchmarks.suites.scaling import cost_model, loopback
from fusedacl.benchmarks.suites.scaling import options as scaling_options
from fusedacl.benchmarks.suites.scaling import ranks as scaling_ranks
from fusedacl.benchmarks.suites.scaling import suite as scaling
from fusedacl.benchmarks.suites.scaling.cost_model import METHODS, Link, Machine, Problem
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
    cost = METHODS[method](replace(SMALL, num_ranks=num_ranks))
    assert (cost.messages, cost.sent_bytes, cost.flops) == (messages, sent_bytes, flops)
    assert cost.received_bytes == sent_bytes


@pytest.mark.parametrize("method", METHODS)
def test_a_single_rank_sends_nothing(method: str) -> None:
    cost = METHODS[method](replace(SMALL, num_ranks=1))
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
        times = cost_model.times_relative_to_ours(cost_model.ring, problem, machine)
        closest = min(closest, *times.values())
    assert closest > 0.99
    assert closest < 1.1


def test_crossover_is_the_first() -> None:
    def memory(num_ranks: int) -> int:
        return METHODS["ours"](replace(SMALL, num_ranks=num_ranks)).memory_bytes

    limit = memory(37)
    first = next(ranks for ranks in range(2, 100) if memory(ranks) > limit)
    assert cost_model.ranks_beyond("ours", SMALL, limit) == first == 38
    assert cost_model.ranks_beyond("ring", SMALL, limit) is None


def test_a_wrong_loss_is_refused(single_rank: None) -> None:
    inputs = scaling_ranks.own_inputs(0, 9, 3, 8)
    scaling_ranks.check(scaling_ranks.losses(), inputs)

    def without_labels(embeddings: Tensor, labels: Tensor, label_embeddings: Tensor) -> Tensor:
        return acl_loss(embeddings, labels, label_embeddings.detach()) + 0 * label_embeddings.sum()

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


def test_no_rank_is_left() -> None:
    with pytest.raises(RuntimeError, match="rank 0 of 1: (?s:.*)ranks.py(?s:.*)random_ expects"):
        # There is no label to draw.
        loopback.run_ranks(scaling_ranks.own_inputs, 1, 3, -1, 8, seconds=120)
    assert not multiprocessing.active_children()


def test_silent_ranks_are_named() -> None:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    with pytest.raises(RuntimeError, match=r"ranks \[0\] gave no answer within 0.05 seconds"):
        loopback._collect([receiver], 0.05)
    sender.close()
    with pytest.raises(RuntimeError, match="rank 0 ended without an answer"):
        loopback._collect([receiver], 10.0)


def test_the_model_counts_what_two_ranks_send(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole program, tiny: bytes, the files it leaves, and the page made from them."""
    run(
        monkeypatch, "--world_sizes", "2", "--num_samples", "6", "--num_labels", "3", "--width",
        "8", "--rounds", "1", "--timeout", "200", "--output_dir", str(tmp_path),
        "--preset", "cpu_loopback", "--preset", "v100_ethernet",
    )  # fmt: skip
    result = json.loads((tmp_path / "scaling.json").read_text(encoding="utf-8"))
    (measured,) = result["measured"]
    for name, method in METHODS.items():
        cost, found = method(Problem(2, 6, 3, 8, 4)), measured["methods"][name]
        assert found["sent_bytes"] == found["received_bytes"] == cost.sent_bytes
        assert found["messages"] == cost.messages
        if found["loopback_bytes"] is not None:
            # What the interface saw has headers and barriers too, but nothing is missing.
            assert found["loopback_bytes"] >= cost.sent_bytes
    assert [model["preset"] for model in result["models"]] == ["cpu_loopback", "v100_ethernet"]
    for file in result["figures"]:
        assert (tmp_path / file).stat().st_size > 10_000
    assert "V100, 25 Gbit/s Ethernet, by the model (data sheets" in capsys.readouterr().out
    text = page([tmp_path])
    assert "### Negatives of all ranks" in text
    assert "By the model, not measured, V100, 25 Gbit/s Ethernet (data sheets" in text
    assert f"](../benchmarks/results/{tmp_path.name}/scaling.png)" in text


def test_quick(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(
        monkeypatch, "--quick", "--preset", "cpu_loopback", "--world_sizes", "2", "--timeout", "200"
    )
    text = capsys.readouterr().out
    assert "2 ranks on loopback" in text
    assert "written:" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--link_gb_s", "2"], "--link_gb_s replaces a data sheet's number in one preset"),
        (["--world_sizes", "2,1"], "the smallest first"),
        (["--world_sizes", "1"], "needs the link between ranks measured"),
        (["--width", "0"], "no whole number above 0"),
        (["--preset", "v100_ethernet", "--link_gb_s", "nan"], "no number above 0"),
    ],
)
def test_mistakes(
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, *options)
    assert message in capsys.readouterr().err


def test_options_replace_a_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    options = "--preset a100_infiniband --link_gb_s 50 --ranks_per_node 4 --memory_gb 40"
    monkeypatch.setattr(sys, "argv", ["scaling", *options.split(), "--no-overlap"])
    arguments = scaling_options.parse(None)
    preset = cost_model.data_sheet_machines(torch.float16)["a100_infiniband"]
    machine = scaling_options.with_assumptions(preset, arguments)
    assert machine.link(5) == Link(preset.between.seconds_per_message, 50e9)
    assert machine.link(4) == preset.within
    assert (machine.memory_bytes, machine.overlaps_messages) == (40e9, False)
    assert "replaced by options: link_gb_s, memory_gb, ranks_per_node" in machine.source


def test_bytes_that_the_model_misses_are_refused() -> None:
    scaling.refuse_bytes("ours", 2, 1000, 1049)
    with pytest.raises(SystemExit, match="ours, 2 ranks: 0 bytes were sent and the model has 612"):
        scaling.refuse_bytes("ours", 2, 0, 612)


def run(monkeypatch: pytest.MonkeyPatch, *options: Any) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["scaling", *options])
    try:
        scaling.main()
    finally:
        torch.set_num_threads(threads)
