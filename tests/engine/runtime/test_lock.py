"""The lock of a directory names its holders."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from fusedacl.engine.runtime.lock import SweepLock


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
