"""The command as a user types it: what it prints, and how it refuses."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from fusedacl.engine.cli.main import ENTRY_POINT_GROUP, _gate_lines, main


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {verb} " in shown for verb in ("train", "evaluate", "predict", "doctor"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "fusedacl trian: Unknown verb 'trian'. Did you mean 'train'?"),
        (["train", "--taks_name", "rte"], "Unknown flag '--taks_name'. Did you mean 'task_name'?"),
        (["train", "--task_name", "rte"], "fusedacl train: output_dir is missing"),
        (["evaluate"], "fusedacl evaluate: model_name_or_path is missing"),
        (["predict", "--output_file", "x.csv"], "fusedacl predict: input_file is missing"),
        (["doctor", "--now"], "doctor takes no arguments"),
        (["angles", "--labels", "a"], "fusedacl angles: no run is named"),
        (["train", "absent.yaml"], "Configuration file 'absent.yaml' does not exist"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1 and "Traceback" not in shown


def test_bench_is_found_through_its_entry_point(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--help"]) == 0
    assert "usage: fusedacl bench" in capsys.readouterr().out
    absent = EntryPoint("bench", "fusedacl.absent:main", ENTRY_POINT_GROUP)
    for installed, why in (([], ""), ([absent], r" (No module named 'fusedacl.absent')")):
        monkeypatch.setattr("fusedacl.engine.cli.main.entry_points", lambda group, i=installed: i)
        assert main(["bench"]) == 2
        shown = capsys.readouterr().err
        assert shown.startswith(f"fusedacl bench: this verb is not installed{why}. In a checkout,")
        assert shown.count("\n") == 1


def test_of_several_processes_the_first_tells_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("fusedacl.engine.cli.main.time.sleep", waits.append)
    # The others leave the first the time, and tell theirs if they are still there.
    third = f"process 3 on {socket.gethostname()}: "
    for rank, place, waited in (("0", "", []), ("3", third, [10.0])):
        monkeypatch.setenv("RANK", rank)
        assert main(["trian"]) == 2
        assert f"fusedacl trian: {place}Unknown verb" in capsys.readouterr().err
        assert waits == waited


@pytest.fixture
def arguments(tiny_bert: Path, tiny_data: Path, tmp_path: Path) -> list[str]:
    """Those of a training run in `tmp_path`/run; the data are named in a file."""
    config = tmp_path / "config.yaml"
    config.write_text(f"task_name: opinions\ndata_dir: {tiny_data}\nnum_train_epochs: 2\n")
    words = ["train", str(config), "--model_name_or_path", str(tiny_bert), "--disable_tqdm"]
    return [*words, "--output_dir", str(tmp_path / "run"), "--max_seq_length", "16"]


def test_train_evaluate_predict(
    arguments: list[str], tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert "validation, exit at layer 2: accuracy" in shown.out
    gate = [line for line in shown.out.splitlines() if line.startswith("epoch")]
    assert len(gate) == 2 and gate[1].startswith("epoch 2: gate dropped")
    assert f"are in {run}" in shown.out
    assert main(arguments) == 2
    assert "is not empty. Use --resume_from_checkpoint latest" in capsys.readouterr().err

    model = ["--model_name_or_path", str(run), "--disable_tqdm"]
    assert main(["evaluate", *model, "--task_name", "opinions", "--data_dir", str(tiny_data)]) == 0
    evaluated = capsys.readouterr().out
    assert evaluated.strip() in shown.out

    (tmp_path / "texts.csv").write_text("text\na good dog\n")
    files = ["--input_file", str(tmp_path / "texts.csv"), "--output_file", str(tmp_path / "o.csv")]
    assert main(["predict", *model, *files]) == 2
    assert "the model reads 'sentence', the columns are 'text'" in capsys.readouterr().err
    files += ["--text_column", "text"]
    assert main(["predict", *model, *files]) == 0
    assert (tmp_path / "o.csv").read_text().startswith("label,probability_negative,probability_")


def test_the_gate_has_one_line_an_epoch() -> None:
    def row(epoch: int, group: str, share: float, angle: float) -> dict[str, Any]:
        names = "epoch", "group", "steps", "dropped_share", "angle_median"
        return dict(zip(names, (epoch, group, 40, share, angle), strict=True))

    alone = [row(1, "model", 0.125, 80.0), row(2, "model", 0.0, 70.5)]
    exits = [row(3, "exit 1", 0.5, 95), row(3, "exit 2", 0.25, 81), row(3, "exit 3", 0, 60)]
    assert _gate_lines(alone + exits) == [
        "epoch 1: gate dropped 12.5% of 40 steps, median angle 80.0 degrees",
        "epoch 2: gate dropped 0.0% of 40 steps, median angle 70.5 degrees",
        "epoch 3: gate dropped 25.0% of 40 steps (exit 1 50%, exit 2 25%, exit 3 0%), "
        "median angle 81.0 degrees",
    ]
    compared = alone[0] | {"compared_steps": 8, "agreement_share": 0.75}
    assert _gate_lines([compared]) == [
        "epoch 1: gate dropped 12.5% of 40 steps, median angle 80.0 degrees, as the exact gate "
        "decides in 75.0% of 8 steps compared"
    ]
    assert _gate_lines([]) == []


def test_failures_during_the_run_are_status_1(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    diverging = ["--learning_rate", "1e30", "--max_grad_norm", "0", "--warmup_ratio", "0"]
    assert main([*arguments, *diverging]) == 1
    assert "NaN or infinite" in capsys.readouterr().err


def test_interrupted_from_the_keyboard(arguments: list[str], tmp_path: Path) -> None:
    """A real process, a real SIGINT, and the same command goes on from the checkpoint."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "fusedacl.engine", *arguments, "--logging_steps", "1"]
    command += ["--num_train_epochs", "2000", "--save_steps", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
    )
    try:
        deadline = time.monotonic() + 120
        metrics = run / "metrics.jsonl"
        while not metrics.exists() or not metrics.read_text():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Stopped by SIGINT. Saved" in errors and "Traceback" not in errors
    assert "Continue by running the same command with --resume_from_checkpoint latest" in errors
    assert list(run.glob("checkpoint-*/training_state.pt"))
