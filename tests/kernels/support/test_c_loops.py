import shutil
import sys

import pytest
from fusedacl.kernels.support.c_loops import library


@pytest.mark.parametrize("name", ["gradients._cpu_loop", "contrastive.tiled._cpu_loop"])
def test_loops_are_built_where_a_compiler_is(name: str) -> None:
    """setup.py ignores a loop that does not compile."""
    if sys.platform != "linux" or shutil.which("gcc") is None:
        pytest.skip("no gcc on this machine")
    assert library(name) is not None


def test_a_loop_that_was_not_built_is_none() -> None:
    assert library("no_such_loop") is None
