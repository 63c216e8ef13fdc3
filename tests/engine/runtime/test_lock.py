"""The lock of a directory: held once, inherited by children, and its holders named."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from fusedacl.engine.runtime.lock import SweepLock


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
    named = rf"\(process {os.getpid()} on {socket.gethostname()}\)"
    with lock.held():
        lock.name([ended.pid, os.getpid()])
        lock.name([os.getpid(), ended.pid])
        with pytest.raises(ValueError, match=named), SweepLock(tmp_path).held():
            pass
        lock.name([ended.pid])
        with pytest.raises(ValueError, match=r"\(unknown process\)"):
            SweepLock(tmp_path).check_free()
