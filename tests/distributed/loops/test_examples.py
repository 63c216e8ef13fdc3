"""The loops of docs/examples run, and print an angle for every optimizer step."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from example_cases import EXAMPLES, run_example, run_script
from rank_pool import Ranks

SIZES = ["--max_steps", "4", "--per_device_train_batch_size", "6", "--max_seq_length", "24"]


def check(printed: str, num_steps: int) -> None:
    angles = [float(angle) for angle in re.findall(r"angle (\S+)$", printed, re.MULTILINE)]
    assert len(angles) == num_steps
    assert all(0.0 <= angle <= 180.0 for angle in angles)


def test_every_script_is_run() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")}
    ours = {"plain.py", "ddp.py", "fsdp2.py", "accelerate_loop.py", "deepspeed_zero.py"}
    assert ours < names
    for name in ours:
        assert f"docs/examples/{name}" in (EXAMPLES / name).read_text()


def test_plain(tiny_bert: Path) -> None:
    check(run_script(EXAMPLES / "plain.py", ["--model_name_or_path", str(tiny_bert), *SIZES]), 4)


@pytest.mark.parametrize(
    ("name", "num_steps"), [("ddp.py", 2), ("fsdp2.py", 4), ("accelerate_loop.py", 4)]
)
def test_on_two_ranks(zero_ranks: Ranks, tiny_bert: Path, name: str, num_steps: int) -> None:
    if name.startswith("accelerate"):
        pytest.importorskip("accelerate")
    arguments = ["--model_name_or_path", str(tiny_bert), *SIZES]
    first, second = zero_ranks.run(run_example, name, arguments)
    check(first, num_steps)
    check(second, 0)


@pytest.mark.parametrize("stage", ["0", "3"])
def test_deepspeed(zero_ranks: Ranks, tiny_bert: Path, stage: str) -> None:
    pytest.importorskip("deepspeed")
    from zero_gate_cases import run_zero_script

    path = EXAMPLES / "deepspeed_zero.py"
    arguments = ["--model_name_or_path", str(tiny_bert), *SIZES, "--zero_stage", stage]
    first, _ = zero_ranks.run(run_zero_script, path, arguments)
    check(first, 2)


def test_the_script_of_the_page_on_loops(zero_ranks: Ranks, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    from zero_gate_cases import run_zero_script

    page = (EXAMPLES.parent / "loops.md").read_text(encoding="utf-8")
    script = re.search(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert script is not None
    path = tmp_path / "train.py"
    path.write_text(script[1], encoding="utf-8")
    first, _ = zero_ranks.run(run_zero_script, path, [])
    check(first, 10)
