import shutil
import sys
from pathlib import Path

import pytest
from fusedacl.kernels.support import c_loops
from fusedacl.kernels.support.c_loops import checksum_of, library


@pytest.mark.parametrize("name", ["gradients._cpu_loop", "contrastive.tiled._cpu_loop"])
def test_loops_are_built_where_a_compiler_is(name: str) -> None:
    """setup.py ignores a loop that does not compile."""
    if sys.platform != "linux" or shutil.which("gcc") is None:
        pytest.skip("no gcc on this machine")
    assert library(name) is not None


def test_a_loop_that_was_not_built_is_none() -> None:
    assert library("no_such_loop") is None


def test_a_loop_of_other_sources_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As after a pull without another installation; without sources nothing is compared."""
    name = "gradients._cpu_loop"
    if library(name) is None:
        pytest.skip("the compiled loop was not built: no C compiler at installation")
    assert checksum_of(tmp_path) is None
    (tmp_path / "a.c").write_text("int x;\n")
    checksum = checksum_of(tmp_path)
    (tmp_path / "b.h").write_text("int y;\n")
    assert checksum_of(tmp_path) != checksum
    monkeypatch.setattr(c_loops, "checksum_of", lambda folder: checksum)
    library.cache_clear()
    with pytest.raises(RuntimeError, match="was built from other C files than those beside it"):
        library(name)
    monkeypatch.setattr(c_loops, "built_from", lambda loop: None)
    with pytest.raises(RuntimeError, match="install the checkout again"):
        library(name)
