"""Peak memory in a child process: its numbers, errors, and its own end."""

from __future__ import annotations

import os

import pytest
import torch
from fusedacl.benchmarks.measuring.memory import Child, HighWaterMark

MEBIBYTE = 2**20

needs_mark = pytest.mark.skipif(
    not HighWaterMark.is_available(), reason="no high-water mark that can be reset"
)


def hold(mebibytes: int) -> int:
    return HighWaterMark().raised_by(lambda: torch.ones(mebibytes * MEBIBYTE, dtype=torch.uint8))


def fail() -> int:
    raise RuntimeError("no room\nat all")


def end() -> int:
    os._exit(1)


@needs_mark
def test_a_child_measures_one_call_after_another() -> None:
    with Child(threads=1) as child:
        # Freed memory of a larger call does not hide a smaller one.
        for size in (96, 32):
            found = child.measure(hold, size)
            assert isinstance(found, int)
            assert found / MEBIBYTE == pytest.approx(size, abs=6)
        assert child.measure(fail) == "RuntimeError: no room"
        process = child._process
        assert "without an answer" in str(child.measure(end))
        # A new child measures on.
        assert isinstance(child.measure(hold, 1), int)
        assert child._process is not process
    assert not child._process


@needs_mark
def test_a_silent_child_is_ended() -> None:
    with Child(threads=1, seconds=0.0) as child:
        assert child.measure(hold, 1) == "no answer within 0 seconds"
        assert child._process is None


def test_nothing_is_measured_without_a_high_water_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HighWaterMark, "is_available", lambda: False)
    with Child(threads=1) as child:
        assert child.measure(fail) is None
        assert child._process is None
