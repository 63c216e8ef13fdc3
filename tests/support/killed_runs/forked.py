"""Training runs that a test may kill: processes forked from a server that has imported torch.

    with ForkedRuns(directory) as runs:
        process = runs.start(options)           # `fusedacl train` with these options
        os.kill(process, signal.SIGKILL)
        assert runs.wait(process) == -9

Importing torch takes longer than a run; a forked process need not do it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class ForkedRuns(contextlib.AbstractContextManager["ForkedRuns"]):
    """Server of forked runs; they append their output to `directory`/runs.log."""

    def __init__(self, directory: Path) -> None:
        self.log = directory / "runs.log"
        self.server = subprocess.Popen(
            [sys.executable, __file__, str(self.log)],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "DS_ACCELERATOR": "cpu",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, options: Mapping[str, Any], dies: str | None = None) -> int:
        """Start a run and return its process id; `dies`: key of `DEATHS`, where it kills itself."""
        return self._ask(start=[f"--{name}={value}" for name, value in options.items()], dies=dies)

    def wait(self, process: int) -> int:
        """Wait for a run; return its exit status, or the negative number of a signal."""
        return self._ask(wait=process)

    def _ask(self, **request: Any) -> int:
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def __exit__(self, *_: object) -> None:
        self.server.communicate(timeout=60)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_second_call(owner: Any, name: str, *, before: bool) -> None:
    """Make the second call of a function kill this process, before or after its work."""
    original: Callable[..., Any] = getattr(owner, name)
    calls: list[str] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        if before and len(calls) == 2:
            killed()
        result = original(*arguments, **options)
        if not before and len(calls) == 2:
            killed()
        return result

    setattr(owner, name, counted)


def while_forgetting() -> None:
    """Make this process die after it has deleted one file of an old checkpoint."""
    from fusedacl.engine.training.storage import checkpoint

    original = checkpoint.shutil.rmtree

    def rmtree(path: Path, **options: Any) -> None:
        if path.is_dir() and any(path.iterdir()):
            next(path.iterdir()).unlink()
            killed()
        original(path, **options)

    checkpoint.shutil.rmtree = rmtree  # type: ignore[assignment]


def moving_the_final_model() -> None:
    """Make this process die after it has moved half of the final model's files."""
    original = Path.replace
    moved: list[str] = []

    def replace(self: Path, target: Path) -> Path:
        if self.parent.name == "model":
            moved.append(self.name)
            if len(moved) == 3:
                killed()
        return original(self, target)

    Path.replace = replace  # type: ignore[method-assign, assignment]


def _patch(module: str, name: str, *, before: bool) -> Callable[[], None]:
    def patch() -> None:
        owner = importlib.import_module(f"fusedacl.engine.training.{module}")
        in_second_call(owner, name, before=before)

    return patch


DEATHS: dict[str, Callable[[], None]] = {
    "the first file is written": _patch("storage.checkpoint", "save_model", before=False),
    "all files but the manifest": _patch("storage.checkpoint", "write_manifest", before=True),
    "the manifest is written": _patch("storage.checkpoint", "write_manifest", before=False),
    "the directory has its name": _patch("storage.checkpoint", "_publish", before=False),
    "an old one is half deleted": while_forgetting,
    "the final model is half moved": moving_the_final_model,
}


def serve(log: str) -> None:
    """Answer requests on standard input: fork a run (its process id), or wait (its exit status)."""
    # Imports may print: standard output becomes standard error, answers keep the original.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from fusedacl.engine.cli.main import main

    # What a run imports, itself or through transformers.
    for module in (
        "fusedacl.engine.training.trainer", "transformers.models.bert.modeling_bert",
        "transformers.models.bert.tokenization_bert", "pandas", "pyarrow", "sklearn.metrics",
        "deepspeed",
    ):  # fmt: skip
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(os.waitstatus_to_exitcode(status), file=answers, flush=True)
            continue
        process = os.fork()
        if process == 0:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            if request["dies"] is not None:
                DEATHS[request["dies"]]()
            status = main(["train", *request["start"]])
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        print(process, file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
