"""The output directory: what may be overwritten, and what is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from fusedacl.engine import TrainingConfig
from fusedacl.engine.config.fields import write_yaml
from fusedacl.engine.training.storage.checkpoint import CONFIG_FILE
from fusedacl.engine.training.storage.output_dir import make_output_dir


def config_of(output_dir: Path | str, **options: object) -> TrainingConfig:
    data = {} if "train_file" in options else {"task_name": "quickstart"}
    return TrainingConfig.create(**{**data, "output_dir": str(output_dir), **options}).resolved()


def write_run(path: Path) -> Path:
    """An earlier run's directory."""
    path.mkdir(parents=True)
    write_yaml(config_of(path), path / CONFIG_FILE)
    (path / "results.json").touch()
    return path


def test_output_dir_is_protected(tmp_path: Path) -> None:
    output_dir = tmp_path / "deep" / "run"
    assert make_output_dir(config_of(output_dir)) == output_dir
    make_output_dir(config_of(output_dir))
    (output_dir / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty. Use --resume_from_checkpoint latest"):
        make_output_dir(config_of(output_dir))
    with pytest.raises(ValueError, match="not a run of fusedacl and is left alone"):
        make_output_dir(config_of(output_dir, overwrite_output_dir=True))
    write_yaml(config_of(output_dir), output_dir / CONFIG_FILE)
    make_output_dir(config_of(output_dir, overwrite_output_dir=True))
    assert not any(output_dir.iterdir())
    (output_dir / "file").touch()
    with pytest.raises(ValueError, match="is a file; name a directory"):
        make_output_dir(config_of(output_dir / "file"))


@pytest.mark.parametrize(
    "text", ["", "- a\n", "steps: [", "database: local\n", "output_dir: .\nobjective: acl\n"]
)
def test_the_config_of_a_project_makes_no_run(tmp_path: Path, text: str) -> None:
    (tmp_path / CONFIG_FILE).write_text(text)
    with pytest.raises(ValueError, match="no config.yaml that a run wrote.*is left alone"):
        make_output_dir(config_of(tmp_path, overwrite_output_dir=True))
    assert (tmp_path / CONFIG_FILE).exists()


def test_the_config_of_an_earlier_version_makes_a_run(tmp_path: Path) -> None:
    file = write_run(tmp_path / "run") / CONFIG_FILE
    file.write_text(file.read_text().replace("aux_weight:", "an_option_of_old:"))
    make_output_dir(config_of(tmp_path / "run", overwrite_output_dir=True))
    assert not file.exists()


@pytest.mark.parametrize(
    ("name", "inside", "options"),
    [
        ("train_file", "train.csv", {}),
        ("validation_file", "data/dev.csv", {"train_file": "elsewhere.csv"}),
        ("dataset_name", "data", {}),
        ("model_name_or_path", "", {"task_name": "quickstart"}),
        ("tokenizer_name", "words", {"task_name": "quickstart"}),
        ("class_weights", "weights.json", {"task_name": "quickstart"}),
        ("stage1_model", "checkpoint-3", {"task_name": "quickstart", "strategy": "two_stage"}),
        ("data_dir", "data", {"task_name": "rte"}),
        ("task_name", "", {"data_dir": "..", "task_name": "run"}),
    ],
)
def test_what_the_run_reads_is_not_deleted(
    name: str, inside: str, options: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output_dir = write_run(tmp_path / "run")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    path = output_dir / inside
    if inside.endswith(("csv", "json")):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    else:
        path.mkdir(exist_ok=True)
    options = {name: str(path), **options, "overwrite_output_dir": "true"}
    if name != "stage1_model":
        options.setdefault("model_name_or_path", "some/encoder")
    with pytest.raises(ValueError, match=f"overwrite_output_dir would delete {name} '"):
        make_output_dir(config_of(output_dir, **options))
    assert path.exists()


def test_another_run_below_is_not_deleted(tmp_path: Path) -> None:
    output_dir, overwrite = write_run(tmp_path / "run"), {"overwrite_output_dir": True}
    (output_dir / "checkpoint-4").mkdir()
    # Files of this name that other programs write, as W&B does.
    (output_dir / "wandb").mkdir()
    (output_dir / "wandb" / CONFIG_FILE).write_text("wandb_version: 1\n")
    inner = write_run(output_dir / "more" / "inner")
    with pytest.raises(ValueError, match="would delete another run, '.*inner', as it lies in"):
        make_output_dir(config_of(output_dir, **overwrite))
    assert (inner / CONFIG_FILE).exists() and (output_dir / "results.json").exists()
    make_output_dir(config_of(inner, **overwrite))
    inner.rename(tmp_path / "elsewhere")
    (output_dir / "link").symlink_to(write_run(tmp_path / "linked"))
    make_output_dir(config_of(output_dir, **overwrite))
    assert not any(output_dir.iterdir()) and (tmp_path / "linked" / CONFIG_FILE).exists()


def test_the_current_directory_is_not_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = write_run(tmp_path / "run") / "here"
    here.mkdir()
    for directory, output_dir in (here, tmp_path / "run"), (tmp_path / "run", "."):
        monkeypatch.chdir(directory)
        with pytest.raises(ValueError, match="would delete the current directory '.'"):
            make_output_dir(config_of(output_dir, overwrite_output_dir=True))
    # A run goes on from there.
    make_output_dir(config_of(".", resume_from_checkpoint="latest"))
