"""Checks that the tests of both analyses share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fusedacl.engine.cli.main import main


@pytest.fixture
def refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[list[str], str], None]:
    """Check that a command prints a message, ends with status 2 and writes nothing."""

    def check(words: list[str], message: str) -> None:
        out = tmp_path / "out"
        assert main([*words, "--output_dir", str(out), "--disable_tqdm"]) == 2
        assert message in capsys.readouterr().err
        assert not out.exists()

    return check
