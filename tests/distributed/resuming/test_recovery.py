"""Two processes, one of them or their launcher killed: who ends, what is said, what is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

pytest.importorskip("deepspeed")

from fusedacl.engine import MultiExitForSequenceClassification, evaluate
from fusedacl.engine.config.commands import EvaluationConfig
from fusedacl.engine.config.fields import build
from fusedacl.engine.runtime.manifest import fault, step_of
from fusedacl.engine.training.storage.checkpoint import checkpoints
from rank_pool import Ranks
from tiny_runs import flags, records
from training_cases import deepspeed_file, model_of, trained

# Time in which the remaining processes of a run end, on a busy machine too.
SECONDS = 60.0
HERE = Path(__file__).parent


@pytest.fixture
def options(tiny_options: dict[str, Any]) -> dict[str, Any]:
    return {
        **tiny_options,
        "learning_rate": 1e-3, "dropout": 0.2, "num_train_epochs": 1,
        "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 3,
        "save_total_limit": None, "device": "cpu",
    }  # fmt: skip


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
DEEPSPEED = ("deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "29514")


def launch(
    options: dict[str, Any], *program: str, launcher: Sequence[str] = TORCHRUN
) -> subprocess.Popen[str]:
    """A launcher of two processes, all in a process group of their own, as in a terminal."""
    if not sys.platform.startswith("linux"):
        pytest.skip("processes are looked up in /proc")
    return subprocess.Popen(
        [
            sys.executable, "-m", *launcher, *program, *flags(options),
        ],
        start_new_session=True,
        env={
            **os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
            "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def running(run: str) -> list[int]:
    """The processes whose command names this directory, but for ended ones."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            # The command of a process that has ended, and was not waited for, is empty.
            if entry.name.isdigit() and run in (entry / "cmdline").read_text():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 240
    while not file.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.005)


def ended(process: subprocess.Popen[str], run: str) -> str:
    """The output of the launcher and its processes, all of which must end in time."""
    try:
        # The output ends when the last of them has.
        words, _ = process.communicate(timeout=SECONDS)
        assert not running(run)
    finally:
        for left in running(run):
            os.kill(left, signal.SIGKILL)
    return words


def assert_goes_on(options: dict[str, Any], two_ranks: Ranks, undisturbed: Path) -> None:
    """The run, resumed, ends as one that nobody killed."""
    run = Path(options["output_dir"])
    two_ranks.run(trained, {**options, "output_dir": str(undisturbed)})
    two_ranks.run(trained, {**options, "resume_from_checkpoint": "latest"})
    assert model_of(run) == model_of(undisturbed)
    assert records(run) == records(undisturbed)
    assert all(fault(path) is None for path in checkpoints(run))
    left, expected = ({path.name for path in made.iterdir()} for made in (run, undisturbed))
    # Told to stop, it saves at whatever step that is.
    assert expected <= left
    assert all(name.startswith("checkpoint-") and name[-1].isdigit() for name in left - expected)


def test_a_rank_dies_in_the_middle_of_a_save(options, two_ranks: Ranks, tmp_path: Path) -> None:
    options["deepspeed_config"] = deepspeed_file(tmp_path, 2)
    started = launch(options, str(HERE.parents[1] / "support" / "killed_runs" / "dying_rank.py"))
    wait_for(tmp_path / "run" / "checkpoint-3", started)
    words = ended(started, options["output_dir"])
    assert started.returncode == 1
    assert "process 0 of 2 on" in words and "stops after step 6: process(es) 1 on this" in words
    # The launcher says it too.
    assert "(exitcode: -9) local_rank: 1" in words
    assert [step_of(path) for path in checkpoints(tmp_path / "run")] == [3]
    assert_goes_on(options, two_ranks, tmp_path / "undisturbed")


def test_the_launcher_is_killed(options, two_ranks: Ranks, tmp_path: Path) -> None:
    """ZeRO 3, whose weights lie in parts; what it leaves are whole models all the same."""
    options |= {"deepspeed_config": deepspeed_file(tmp_path, 3), "strategy": "two_stage"}
    run = tmp_path / "run"
    started = launch(options, "-m", "fusedacl.engine", "train")
    wait_for(run / "checkpoint-3", started)
    os.kill(started.pid, signal.SIGKILL)
    words = ended(started, options["output_dir"])
    assert started.returncode == -signal.SIGKILL
    assert words.count("The launcher has ended: saving after this step") == 2
    assert "Stopped by SIGTERM. Saved" in words
    assert not (run / "results.json").exists()
    assert_goes_on(options, two_ranks, tmp_path / "undisturbed")

    # In parts they were while it trained: each as a model of its own scores what was noted then.
    for path in (run / "checkpoint-6", run / "checkpoint-8", run):
        model = MultiExitForSequenceClassification.from_pretrained(path).state_dict()
        saved = safetensors.torch.load_file(path / "model.safetensors")
        assert all(torch.equal(model[name], value) for name, value in saved.items())
        assert all(value.numel() > 0 for value in model.values())
    source = {name: options[name] for name in ("task_name", "device", "data_dir")}
    for path, step in ((run / "checkpoint-8", 8), (run, 16)):
        values = {**source, "model_name_or_path": str(path)}
        scores = evaluate(build(EvaluationConfig, values))["validation"]
        noted = [line for line in records(run, "validation") if line["step"] == step]
        assert noted, "an evaluation ends each epoch"
        for line in noted:
            assert scores[line["exit"]] == pytest.approx(line["metrics"], rel=1e-5)


def test_ctrl_c_under_deepspeeds_launcher(options, tmp_path: Path) -> None:
    """Processes that the terminal has sent SIGINT get SIGTERM from the launcher too."""
    options |= {"deepspeed_config": deepspeed_file(tmp_path, 2), "num_train_epochs": 100}
    started = launch(options, "--module", "fusedacl.engine", "train", launcher=DEEPSPEED)
    wait_for(tmp_path / "run" / "checkpoint-3", started)
    os.killpg(started.pid, signal.SIGINT)
    words = ended(started, options["output_dir"])
    assert "Stopped by SIGINT. Saved" in words, words
    stop = checkpoints(tmp_path / "run")[-1]
    assert f"{stop.name}. Continue by running" in words


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (0, {"strategy": "alternating", "num_train_epochs": 2}),
        (1, {"strategy": "joint", "bf16": True}),
        (2, {"negatives": "global", "gradient_accumulation_steps": 2, "num_train_epochs": 2}),
        (3, {"strategy": "joint", "gradient_accumulation_steps": 2, "num_train_epochs": 2}),
    ],
)
def test_goes_on_in_the_middle_of_an_epoch(
    stage: int, changes: dict[str, Any], options, two_ranks: Ranks, tmp_path: Path
) -> None:
    options |= {"deepspeed_config": deepspeed_file(tmp_path, stage), **changes}
    run, before = Path(options["output_dir"]), tmp_path / "before"
    two_ranks.run(trained, options)
    shutil.copytree(run, before)
    (run / "model.safetensors").unlink()
    two_ranks.run(trained, {**options, "resume_from_checkpoint": "checkpoint-3"})
    assert (run / "checkpoint-6.superseded").is_dir()
    assert model_of(run) == model_of(before)
    assert records(run) == records(before)


def test_the_best_model_of_two_processes(options, two_ranks: Ranks, tmp_path: Path) -> None:
    options |= {
        "deepspeed_config": deepspeed_file(tmp_path, 3),
        "load_best_model_at_end": True, "eval_steps": 3,
        # The loss falls, so that the first is the best where greater is better.
        "greater_is_better": True, "save_total_limit": 1,
    }  # fmt: skip
    first, second = two_ranks.run(trained, options)
    assert first == second
    run = tmp_path / "run"
    best = json.loads((run / "results.json").read_text())["best"]
    assert best["step"] == 3
    assert [step_of(path) for path in checkpoints(run)] == [3, 6]
    assert model_of(run) == model_of(run / f"checkpoint-{best['step']}")
    losses = [line["metrics"]["loss"] for line in records(run) if line["split"] == "validation"]
    assert best["value"] == max(losses) == first["validation"][2]["loss"]


def test_a_damaged_part_is_found_by_all(options, two_ranks: Ranks, tmp_path: Path) -> None:
    options["deepspeed_config"] = deepspeed_file(tmp_path, 2)
    before = two_ranks.run(trained, options)
    run = tmp_path / "run"
    (run / "checkpoint-6" / "training_state-process1.pt").unlink()
    assert two_ranks.run(trained, {**options, "resume_from_checkpoint": "latest"}) == before
    assert [step_of(path) for path in checkpoints(run)] == [3, 6]
