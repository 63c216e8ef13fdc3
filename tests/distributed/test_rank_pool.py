"""The tests' own ranks: failures are reported, and no process stays behind."""

import os
import time

import pytest
import torch
from rank_pool import Ranks


def total_on_rank(rank: int, number: int) -> int:
    value = torch.tensor(rank + number)
    torch.distributed.all_reduce(value)
    return int(value)


def fail_on_rank(rank: int) -> int:
    if rank == 1:
        raise KeyError("this one")
    return rank


def hang_on_rank(rank: int) -> None:
    if rank == 0:
        time.sleep(600)


def die_on_rank(rank: int) -> None:
    if rank == 1:
        os._exit(7)


def test_results_failures_and_ends() -> None:
    with Ranks(2) as ranks:
        assert ranks.run(total_on_rank, 10) == [21, 21]
        with pytest.raises(AssertionError, match="(?s)rank 1: Traceback.*this one"):
            ranks.run(fail_on_rank)
        assert ranks.run(total_on_rank, 20) == [41, 41]
        start = time.monotonic()
        with pytest.raises(AssertionError, match=r"no answer in time from ranks \[0\]"):
            ranks.run(hang_on_rank, seconds=1)
        assert time.monotonic() - start < 30
        assert all(process.returncode is not None for process in ranks.processes)
        with pytest.raises(AssertionError, match="have been ended"):
            ranks.run(total_on_rank, 10)


def test_a_rank_that_dies_is_named() -> None:
    with Ranks(2) as ranks, pytest.raises(AssertionError, match="rank 1: it has ended"):
        ranks.run(die_on_rank)
    assert all(process.returncode is not None for process in ranks.processes)
