"""Runs tests of kernels on the machine for PTX: `python -m pytest -p ptx.pytest_plugin …`.

Environment: PTX_CAPABILITY, 70 unless given; PTX_ERRORS=1 for approximate functions with errors of
the ISA's size; TRITON_CACHE_DIR, which no binaries may be in; tests/support in PYTHONPATH.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from .driver import Driver
from .kernels import run_on_machine

CAPABILITY = int(os.environ.get("PTX_CAPABILITY", "70"))
HAS_ERRORS = os.environ.get("PTX_ERRORS") == "1"
driver = run_on_machine(CAPABILITY, errors=HAS_ERRORS)


@pytest.fixture
def ptx_driver() -> Driver:
    return driver


def pytest_terminal_summary(terminalreporter: Any) -> None:
    launches = ", ".join(f"{number} {name}" for name, number in driver.num_launches.items())
    terminalreporter.write_line(f"launches of PTX for sm_{CAPABILITY}: {launches or 'none'}")
