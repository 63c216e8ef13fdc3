"""Checkpoints: whole or absent, named when damaged, the best one kept; one run per directory."""

import errno
import io
import logging
import os
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fusedacl.engine import TrainingConfig
from fusedacl.engine.config.fields import write_yaml
from fusedacl.engine.config.run_options import RunOptions
from fusedacl.engine.runtime.lock import RunLock
from fusedacl.engine.runtime.manifest import (
    MANIFEST_FILE,
    check_not_sealed,
    fault,
    sealed,
    step_of,
    write_manifest,
)
from fusedacl.engine.training.storage.best_model import BestModel
from fusedacl.engine.training.storage.checkpoint import (
    CONFIG_FILE,
    STATE_FILE,
    changed_options,
    checkpoints,
    find_checkpoint,
    load_state,
    save_checkpoint,
    set_aside,
    state_file,
    tidy,
)


def config_of(output_dir: Path, **options: object) -> TrainingConfig:
    return TrainingConfig.create(
        task_name="quickstart", output_dir=str(output_dir), **options
    ).resolved()


class Saved:
    """Stands for a model and for a tokenizer."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def save_pretrained(self, directory: Path, state_dict: object = None) -> None:
        (directory / "model.safetensors").write_bytes(b"weights")
        if self.error is not None:
            raise self.error


def save(output_dir: Path, *steps: int, error: Exception | None = None, **kept: Any) -> list[int]:
    """The steps of the checkpoints that are there after saving these."""
    for step in steps:
        state, keep = {"step": step, "tensor": torch.arange(3)}, kept.get("keep")
        save_checkpoint(output_dir, step, Saved(error), {}, Saved(), state, keep, kept.get("best"))
    return [step_of(path) for path in checkpoints(output_dir)]


def test_saved_state_comes_back(tmp_path: Path) -> None:
    save(tmp_path, 5)
    checkpoint = tmp_path / "checkpoint-5"
    state = load_state(checkpoint)
    assert state["step"] == 5
    assert torch.equal(state["tensor"], torch.arange(3))
    # One of the same step replaces it whole.
    (checkpoint / "old").touch()
    assert save(tmp_path, 5) == [5]
    assert not (checkpoint / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    assert save(tmp_path, 5, 10, 15, 100, keep=2) == [15, 100]
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-100"
    for name in ("checkpoint-15", str(tmp_path / "checkpoint-15")):
        assert find_checkpoint(tmp_path, name).name == "checkpoint-15"


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_loses_nothing_that_was_saved(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="there is no checkpoint to resume from"):
        save(tmp_path, 5, error=FULL)
    save(tmp_path, 5, keep=1)
    with pytest.raises(OSError, match="checkpoint-10 could not be saved.*No space left") as error:
        save(tmp_path, 10, keep=1, error=FULL)
    assert "complete checkpoints there: checkpoint-5" in str(error.value)
    assert "--resume_from_checkpoint latest" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    assert load_state(tmp_path / "checkpoint-5")["step"] == 5


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "Free some space and run again"),
        (OSError(errno.EROFS, "Read-only file system"), "cause of that error and run again"),
        # As safetensors reports it.
        (RuntimeError("I/O error: Input/output error (os error 5)"), "that error and run again"),
    ],
)
def test_not_every_error_is_a_full_disk(error: Exception, words: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=f"checkpoint-5 could not be saved .*{words}"):
        save(tmp_path, 5, error=error)


class FullFile(io.RawIOBase):
    """A file on a disk without room."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if len(data) > 64:
            raise FULL
        return len(data)


def raise_full(state: object, file: object) -> None:
    raise FULL


# torch's own writer puts an internal RuntimeError on top of the disk's error.
@pytest.mark.parametrize(
    "write", [raise_full, lambda state, _, save=torch.save: save(state, FullFile())]
)
def test_a_full_disk_while_the_optimizer_is_written(
    write: Callable[..., None], tmp_path: Path, monkeypatch
) -> None:
    save(tmp_path, 5)
    monkeypatch.setattr(torch, "save", write)
    with pytest.raises(OSError, match="No space left .*complete checkpoints there: checkpoint-5"):
        save(tmp_path, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_a_killed_save_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / "checkpoint-10.partial").mkdir()
    (tmp_path / "checkpoint-15").mkdir()
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-5"
    tidy(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-5", "checkpoint-15"}
    save(tmp_path, 10)
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-10"


def test_what_cannot_be_deleted_ends_no_run(tmp_path: Path, monkeypatch, caplog) -> None:
    """As on NFS, where a directory with an open file stays."""
    save(tmp_path, 5)
    deleted = shutil.rmtree

    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if not path.name.startswith("checkpoint-5"):
            deleted(path, ignore_errors=ignore_errors)
        elif not ignore_errors:
            raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    assert save(tmp_path, 10, 15, keep=1) == [15]
    tidy(tmp_path)
    assert caplog.text.count("checkpoint-5.partial could not be deleted and takes up room:") == 2
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-15"
    # A name that is needed must be free.
    with pytest.raises(OSError, match="checkpoint-5 could not be saved .*resource busy"):
        save(tmp_path, 5)
    # Kept under its name, where the one that it is to take stays.
    set_aside(tmp_path, 5)
    assert save(tmp_path, 20, keep=1) == [20]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_that_flushes_no_directory(number: int, tmp_path: Path, monkeypatch) -> None:
    flush = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    if number == errno.EIO:
        with pytest.raises(OSError, match="checkpoint-5 could not be saved .*Input/output"):
            save(tmp_path, 5)
    else:
        assert save(tmp_path, 5) == [5]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_damaged_state(tmp_path: Path, content: bytes) -> None:
    save(tmp_path, 5)
    checkpoint = tmp_path / "checkpoint-5"
    (checkpoint / STATE_FILE).write_bytes(content)
    with pytest.raises(ValueError, match="training_state.pt' is damaged"):
        load_state(checkpoint)


def test_unknown_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such complete checkpoint .*: there are none"):
        find_checkpoint(tmp_path, "latest")
    save(tmp_path, 5)
    with pytest.raises(ValueError, match="Complete checkpoints there: checkpoint-5"):
        find_checkpoint(tmp_path, "checkpoint-6")


def test_a_checkpoint_is_sealed_and_its_copy_is_not(tmp_path: Path) -> None:
    save(tmp_path / "run", 5)
    checkpoint = tmp_path / "run" / "checkpoint-5"
    (tmp_path / "link").symlink_to(checkpoint)
    for name in (checkpoint, tmp_path / "link", checkpoint / "." / ".." / checkpoint.name):
        with pytest.raises(ValueError, match="^model_name_or_path=.*5' is a checkpoint.*or a copy"):
            check_not_sealed(name)
    check_not_sealed(tmp_path / "run")
    check_not_sealed(shutil.copytree(checkpoint, tmp_path / "run" / "served"))
    # Without a manifest it belongs to another program.
    (tmp_path / "checkpoint-7").mkdir()
    check_not_sealed(tmp_path / "checkpoint-7")


def test_options_that_differ_are_named(tmp_path: Path) -> None:
    write_yaml(config_of(tmp_path, seed=1), tmp_path / CONFIG_FILE)
    resumed = {"resume_from_checkpoint": "latest", "logging_steps": 3}
    assert changed_options(tmp_path, config_of(tmp_path, seed=1, **resumed)) == []
    changed = changed_options(tmp_path, config_of(tmp_path, seed=2, **resumed))
    assert changed == ["seed: 1 then, 2 now"]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def empty(file: Path) -> None:
    for other in file.parent.iterdir():
        other.unlink()


OTHER_STATE = state_file(1)
DAMAGES: list[tuple[Callable[[Path], object], str, str]] = [
    (cut, "model.safetensors", "is damaged: model.safetensors has 6 bytes, 7 were saved"),
    (flip, "model.safetensors", "is damaged: model.safetensors is not what was saved"),
    (flip, STATE_FILE, "is damaged: training_state.pt is not what was saved"),
    (Path.unlink, OTHER_STATE, "is damaged: training_state-process1.pt is missing"),
    (cut, MANIFEST_FILE, "is damaged: manifest.json cannot be read"),
    (lambda file: file.write_text("[]"), MANIFEST_FILE, "is damaged: manifest.json cannot be read"),
    (Path.unlink, MANIFEST_FILE, "is incomplete: it has no manifest.json"),
    (empty, MANIFEST_FILE, "is incomplete: it has no manifest.json"),
]


@pytest.mark.parametrize(("damage", "name", "words"), DAMAGES)
def test_what_is_damaged_is_named_and_passed_over(
    damage: Callable[[Path], object], name: str, words: str, tmp_path: Path, caplog
) -> None:
    save(tmp_path, 5, 10)
    newest = tmp_path / "checkpoint-10"
    # The files of two processes.
    (newest / OTHER_STATE).write_bytes(b"the other's")
    (newest / MANIFEST_FILE).unlink()
    write_manifest(newest, {file.name: sealed(file) for file in newest.iterdir()})
    assert find_checkpoint(tmp_path, "latest") == newest
    if name == MANIFEST_FILE and damage is cut:
        # Its last byte is the end of the line.
        cut(newest / MANIFEST_FILE)
        assert fault(newest) is None
    damage(newest / name)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fusedacl"):
        assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-5"
    assert f"Not resuming from checkpoint-10: checkpoint-10 {words}" in caplog.text
    for spelling in ("checkpoint-10", str(newest)):
        with pytest.raises(ValueError) as error:
            find_checkpoint(tmp_path, spelling)
        assert f"resume_from_checkpoint={spelling!r}: checkpoint-10 {words}" in str(error.value)
        assert "'latest' takes the newest of them" in str(error.value)
    flip(tmp_path / "checkpoint-5" / STATE_FILE)
    with pytest.raises(ValueError, match="resume_from_checkpoint='latest': no such comp") as error:
        find_checkpoint(tmp_path, "latest")
    assert "all 2 there are damaged or incomplete. --overwrite_output_dir" in str(error.value)


def test_the_best_checkpoint_is_never_deleted(tmp_path: Path) -> None:
    # As in transformers, the best one counts, except with a limit of one.
    assert save(tmp_path / "1", 1, 2, 3, 4, keep=1, best=2) == [2, 4]
    assert save(tmp_path / "2", 1, 2, 3, 4, keep=2, best=2) == [2, 4]
    assert save(tmp_path / "3", 1, 2, 3, 4, keep=3, best=1) == [1, 3, 4]
    assert save(tmp_path / "3", 5, keep=3, best=5) == [3, 4, 5]
    assert save(tmp_path / "all", 1, 2, 3, best=1) == [1, 2, 3]


def test_later_checkpoints_do_not_count_after_going_back(tmp_path: Path) -> None:
    save(tmp_path, 5, 10, 15)
    (tmp_path / "checkpoint-20").mkdir()
    set_aside(tmp_path, 5)
    names = {path.name for path in tmp_path.iterdir()}
    later = {f"checkpoint-{step}.superseded" for step in (10, 15, 20)}
    assert names == {"checkpoint-5"} | later
    # Those of steps that are reached again go.
    assert save(tmp_path, 10, keep=1) == [10]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoint-10", "checkpoint-15.superseded", "checkpoint-20.superseded"}


def test_one_run_at_a_time(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    RunLock(directory).check_free()
    assert not directory.exists()
    first, second = RunLock(directory), RunLock(directory)
    first.take()
    first.take()
    for attempt in (second.take, second.check_free):
        with pytest.raises(ValueError) as error:
            attempt()
        assert f"(process {os.getpid()} on {socket.gethostname()})" in str(error.value)
    first.release()
    second.check_free()
    second.take()
    second.release()


@pytest.mark.parametrize(
    ("options", "values", "best"),
    [
        ({}, [0.5, 0.3, 0.3, 0.4], 2),
        ({"metric_for_best_model": "eval_loss"}, [0.5, 0.3, 0.2, float("nan")], 3),
        ({"metric_for_best_model": "accuracy"}, [0.5, 0.7, 0.7, 0.6], 2),
        ({"metric_for_best_model": "accuracy", "greater_is_better": False}, [0.5, 0.7, 0.2], 3),
        ({"metric_for_best_model": "f1"}, [float("nan")], None),
    ],
)
def test_best(options: dict[str, Any], values: list[float], best: int | None) -> None:
    made = BestModel(RunOptions(**options), ["accuracy", "f1"], [1, 2], [1])
    for step, value in enumerate(values, start=1):
        made.consider(step, {1: {made.metric: 0.0}, 2: {made.metric: value}})
    assert made.step == best
    again = BestModel(RunOptions(**options), ["accuracy", "f1"], [1, 2], [1])
    again.load_state_dict(made.state_dict())
    assert again.result() == made.result()
    other = BestModel(RunOptions(metric_for_best_model="macro_f1"), ["macro_f1"], [2], [0])
    other.load_state_dict(made.state_dict())
    assert other.step is None


def test_which_exits_choose_the_best() -> None:
    with pytest.raises(ValueError, match="'acuracy' is not reported.*Did you mean 'accuracy'"):
        BestModel(RunOptions(metric_for_best_model="acuracy"), ["accuracy"], [2], [0])
    assert BestModel(RunOptions(), [], [2, 4, 6], [2]).layers == [6]
    assert BestModel(RunOptions(), [], [2, 4, 6], [0, 1, 2]).layers == [6]
    # The second stage of two_stage leaves the last exit as it is.
    made = BestModel(RunOptions(), [], [2, 4, 6], [0, 1])
    made.consider(1, {2: {"loss": 1.0}, 4: {"loss": 2.0}, 6: {"loss": 9.0}})
    assert made.value == 1.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metric_for_best_model": "loss"}, "set load_best_model_at_end too"),
        ({"greater_is_better": False}, "greater_is_better=False chooses the best model"),
        ({"load_best_model_at_end": True, "save_steps": 0}, "save_steps=0 saves none"),
        (
            {"load_best_model_at_end": True, "save_steps": 5},
            "save_steps=5, but eval_steps is unset, which means each epoch",
        ),
        ({"load_best_model_at_end": True, "eval_steps": 5}, "set save_steps=5 too"),
        (
            {"load_best_model_at_end": True, "eval_steps": 5, "save_steps": 12},
            "save_steps=12 is not a multiple of eval_steps=5",
        ),
    ],
)
def test_contradictions_about_the_best(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainingConfig.create(task_name="quickstart", output_dir="run", **options).resolved()
    TrainingConfig.create(
        task_name="quickstart", output_dir="run", load_best_model_at_end=True, eval_steps=5,
        save_steps=10,
    ).resolved()  # fmt: skip
