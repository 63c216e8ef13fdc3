"""The lock of a sweep's directory: held once, inherited by runs, and who holds it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fusedacl.engine.runtime.sweep_lock import SweepLock


def test_held_once_and_free_afterwards(tmp_path: Path) -> None:
    lock, other = SweepLock(tmp_path), SweepLock(tmp_path)
    assert not lock.is_held() and lock.descriptors == []
    with lock.held():
        assert other.is_held()
        with pytest.raises(ValueError, match="another sweep is running there"), other.held():
            pass
    assert not other.is_held() and lock.descriptors == []
    with other.held():
        assert lock.is_held()


def test_processes_that_are_still_there_are_named(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended.wait()
    lock = SweepLock(tmp_path)
    with lock.held():
        lock.name([ended.pid, os.getpid()])
        lock.name([os.getpid(), ended.pid])
        with pytest.raises(ValueError, match=rf"\(process {os.getpid()}\)"), lock.held():
            pass
