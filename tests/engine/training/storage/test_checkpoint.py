"""Directories that are whole or absent, and the refusals around output_dir and resuming."""

import errno
import shutil
from pathlib import Path

import pytest
import torch
from fusedacl.engine import TrainingConfig
from fusedacl.engine.config.fields import write_yaml
from fusedacl.engine.runtime.manifest import check_not_sealed
from fusedacl.engine.training.storage.checkpoint import (
    CONFIG_FILE,
    STATE_FILE,
    changed_options,
    checkpoints,
    find_checkpoint,
    load_state,
    save_checkpoint,
)
from fusedacl.engine.training.storage.output_dir import make_output_dir


def config_of(output_dir: Path, **options: object) -> TrainingConfig:
    return TrainingConfig.create(
        task_name="quickstart", output_dir=str(output_dir), **options
    ).resolved()


class Saved:
    """Stands for a model and for a tokenizer."""

    def __init__(self, error: OSError | None = None) -> None:
        self.error = error

    def save_pretrained(self, directory: Path, state_dict: object = None) -> None:
        (directory / "model.safetensors").write_bytes(b"weights")
        if self.error is not None:
            raise self.error


def save(output_dir: Path, step: int, keep: int | None = None, error: OSError | None = None):
    state = {"step": step, "tensor": torch.arange(3)}
    return save_checkpoint(output_dir, step, Saved(error), {}, Saved(), state, keep)


def test_saved_state_comes_back(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 5)
    state = load_state(checkpoint)
    assert state["step"] == 5
    assert torch.equal(state["tensor"], torch.arange(3))
    # One of the same step replaces it whole.
    (checkpoint / "old").touch()
    assert save(tmp_path, 5) == checkpoint
    assert not (checkpoint / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 100):
        save(tmp_path, step, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-15", "checkpoint-100"]
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-100"
    assert find_checkpoint(tmp_path, "checkpoint-15").name == "checkpoint-15"
    assert find_checkpoint(tmp_path, str(tmp_path / "checkpoint-15")).name == "checkpoint-15"


def test_a_full_disk_loses_nothing_that_was_saved(tmp_path: Path) -> None:
    first = save(tmp_path, 5, keep=1)
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="checkpoint-10 could not be saved.*No space left") as error:
        save(tmp_path, 10, keep=1, error=full)
    assert "complete checkpoints there: checkpoint-5" in str(error.value)
    assert "--resume_from_checkpoint latest" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    assert load_state(first)["step"] == 5


def test_a_full_disk_while_the_optimizer_is_written(tmp_path: Path, monkeypatch) -> None:
    save(tmp_path, 5)

    def full(state: object, file: object) -> None:
        file.write(b"a part of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="complete checkpoints there: checkpoint-5"):
        save(tmp_path, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_nothing_to_resume_from_is_not_recommended(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="there is no checkpoint to resume from"):
        save(tmp_path, 5, error=full)


def test_a_killed_save_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / "checkpoint-10.partial").mkdir()
    (tmp_path / "checkpoint-15").mkdir()
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-5"
    save(tmp_path, 10)
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-10"


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_damaged_state(tmp_path: Path, content: bytes) -> None:
    checkpoint = save(tmp_path, 5)
    (checkpoint / STATE_FILE).write_bytes(content)
    with pytest.raises(ValueError, match="training_state.pt' is damaged"):
        load_state(checkpoint)


def test_unknown_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such complete checkpoint .* There: none"):
        find_checkpoint(tmp_path, "latest")
    save(tmp_path, 5)
    with pytest.raises(ValueError, match="There: checkpoint-5"):
        find_checkpoint(tmp_path, "checkpoint-6")


def test_a_checkpoint_is_sealed_and_its_copy_is_not(tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "run", 5)
    (tmp_path / "link").symlink_to(checkpoint)
    for name in (checkpoint, tmp_path / "link", checkpoint / "." / ".." / checkpoint.name):
        with pytest.raises(ValueError, match="^model_name_or_path=.*5' is a checkpoint.*or a copy"):
            check_not_sealed(name)
    check_not_sealed(tmp_path / "run")
    check_not_sealed(shutil.copytree(checkpoint, tmp_path / "run" / "served"))
    # Without a manifest it belongs to another program.
    (tmp_path / "checkpoint-7").mkdir()
    check_not_sealed(tmp_path / "checkpoint-7")


def test_output_dir_is_protected(tmp_path: Path) -> None:
    output_dir = tmp_path / "deep" / "run"
    assert make_output_dir(config_of(output_dir)) == output_dir
    make_output_dir(config_of(output_dir))
    (output_dir / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty. Use --resume_from_checkpoint latest"):
        make_output_dir(config_of(output_dir))
    with pytest.raises(ValueError, match="not a run of fusedacl and is left alone"):
        make_output_dir(config_of(output_dir, overwrite_output_dir=True))
    (output_dir / CONFIG_FILE).write_text("")
    make_output_dir(config_of(output_dir, overwrite_output_dir=True))
    assert not any(output_dir.iterdir())


def test_output_dir_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; name a directory"):
        make_output_dir(config_of(tmp_path / "file"))


def test_options_that_differ_are_named(tmp_path: Path) -> None:
    write_yaml(config_of(tmp_path, seed=1), tmp_path / CONFIG_FILE)
    resumed = {"resume_from_checkpoint": "latest", "logging_steps": 3}
    assert changed_options(tmp_path, config_of(tmp_path, seed=1, **resumed)) == []
    changed = changed_options(tmp_path, config_of(tmp_path, seed=2, **resumed))
    assert changed == ["seed: 1 then, 2 now"]
