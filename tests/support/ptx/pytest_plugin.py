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

# With errors of square roots and divisions, the norms of rows leave these tests' tolerances by up
# to 2.7 times. With both rounded correctly all pass, but for test_temperatures on compute
# capability 8.0, by 2 %. On a processor with other float32 products some may pass or others fail.
SENSITIVE_TO_ERRORS = {
    "test_small_batches.py": (
        "test_options[all-mean]", "test_options[all-sum]", "test_options[others-none]",
        "test_options[negatives-mean]", "test_options[negatives-sum]", "test_shapes[1-2-dtype2]",
        "test_opposite_rows_at_the_lowest_temperature", "test_many_rows",
        "test_strided_inputs[expanded]", "test_ignored_label_of_a_class",
    ),
    "test_large_batches.py": (
        *(f"test_error_is_that_of_eager_pytorch[{case}]" for case in (
            "all-mean", "all-sum", "others-mean", "others-sum", "negatives-mean",
        )),
        "test_every_edge_of_a_tile[15]", "test_strided_inputs_are_read_where_they_lie[expanded]",
        "test_temperatures[0.023-dtype1]", "test_class_sums_in_splits",
    ),
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HAS_ERRORS and item.name in SENSITIVE_TO_ERRORS.get(item.path.name, ()):
            reason = "norms by approximate square roots and divisions"
            item.add_marker(pytest.mark.xfail(raises=AssertionError, reason=reason))


@pytest.fixture
def ptx_driver() -> Driver:
    return driver


def pytest_terminal_summary(terminalreporter: Any) -> None:
    launches = ", ".join(f"{number} {name}" for name, number in driver.num_launches.items())
    terminalreporter.write_line(f"launches of PTX for sm_{CAPABILITY}: {launches or 'none'}")
