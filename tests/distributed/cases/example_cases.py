"""The scripts of docs/examples on the ranks of a test, which have a process group already."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import sys
from pathlib import Path
from unittest import mock

EXAMPLES = Path(__file__).parents[3] / "docs" / "examples"


def run_example(rank: int, name: str, arguments: list[str]) -> str:
    """Run a script with these arguments on this rank; returns what it prints."""
    return run_script(EXAMPLES / name, arguments)


def run_script(path: Path, arguments: list[str]) -> str:
    output = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [str(path), *arguments]),
        mock.patch.object(sys, "path", [str(path.parent), *sys.path]),
        mock.patch.dict(os.environ),
        mock.patch("torch.distributed.init_process_group"),
        mock.patch("torch.distributed.destroy_process_group"),
        contextlib.redirect_stdout(output),
    ):
        os.environ.pop("FUSEDACL_DATA", None)
        os.environ["ACCELERATE_USE_CPU"] = "true"  # as `accelerate launch` does
        runpy.run_path(str(path), run_name="__main__")
    return output.getvalue()
