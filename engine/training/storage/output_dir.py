"""The output directory of a run: checks of its contents, and emptying it if that was asked."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from ...config.training import TrainingConfig
from ...runtime.files import read_file
from ...runtime.lock import LOCK_FILE
from ..profiling import PROFILE_FILE, TRACE_FILE
from .checkpoint import CONFIG_FILE, PARTIAL, RESULTS_FILE


def check_output_dir(config: TrainingConfig) -> Path:
    """The path of the output directory, which is checked but not changed.

    Raises:
        ValueError: it is not empty and neither resuming nor overwriting was asked for, or it is to
            be overwritten and does not hold a run, or holds what this run reads or another run.
    """
    assert config.run.output_dir is not None  # `TrainingConfig.resolved` has refused None
    path = Path(config.run.output_dir)
    if path.exists() and not path.is_dir():
        raise ValueError(f"output_dir={str(path)!r} is a file; name a directory.")
    if _contents(path) and config.run.resume_from_checkpoint is None:
        if not config.run.overwrite_output_dir:
            raise ValueError(
                f"output_dir={str(path)!r} is not empty. Use --resume_from_checkpoint latest to "
                "continue that run, --overwrite_output_dir to delete it, or another directory."
            )
        if not _is_run(path):
            raise ValueError(
                f"overwrite_output_dir: {str(path)!r} holds files but no {CONFIG_FILE} that a run "
                "wrote, so it is not a run of fusedacl and is left alone. Empty it yourself."
            )
        for name, read in _inputs(config).items():
            if path.resolve() in (read.resolve(), *read.resolve().parents):
                raise ValueError(
                    f"overwrite_output_dir would delete {name} {str(read)!r}, as it lies in "
                    f"output_dir={str(path)!r}: name another output_dir."
                )
        for file in sorted(path.rglob(CONFIG_FILE)):
            if file.parent != path and _is_run(file.parent):
                raise ValueError(
                    f"overwrite_output_dir would delete another run, {str(file.parent)!r}, as it "
                    f"lies in output_dir={str(path)!r}: move or delete that run yourself, or name "
                    "another output_dir."
                )
    return path


def _is_run(path: Path) -> bool:
    """True if a directory has a configuration as runs of all versions write it."""
    file = path / CONFIG_FILE
    try:
        # A file that a user wrote begins with no section's name.
        return "output_dir" in read_file(file) and file.read_text("utf-8").startswith("# model\n")
    except (OSError, ValueError):
        return False


def _inputs(config: TrainingConfig) -> dict[str, Path]:
    """Name -> path of the files and directories that a run reads; the hub's are left out."""
    data, model, optimization = config.data, config.model, config.optimization
    task = data.data_dir and data.task_name and str(Path(data.data_dir) / data.task_name)
    named = {
        "the current directory": ".",
        **{name: getattr(data, name) for name in ("train_file", "validation_file", "test_file")},
        "data_dir": data.data_dir,
        "task_name": task,
        "dataset_name": data.dataset_name,
        "model_name_or_path": model.model_name_or_path,
        "tokenizer_name": model.tokenizer_name,
        "stage1_model": optimization.stage1_model,
        "class_weights": config.objective.class_weights,
        "deepspeed_config": optimization.deepspeed_config,
    }
    return {name: Path(path) for name, path in named.items() if path and os.path.exists(path)}


def _contents(path: Path) -> list[Path]:
    """Entries of a directory, except the files that a run leaves if killed at its start."""
    if not path.exists():
        return []
    ours = (LOCK_FILE, CONFIG_FILE + PARTIAL)
    return [child for child in path.iterdir() if child.name not in ours]


def make_output_dir(config: TrainingConfig) -> Path:
    """Create the output directory, or check it and empty it if that was asked for."""
    path = check_output_dir(config)
    if config.run.overwrite_output_dir:
        # The file that identifies a run goes last: if killed here, the rest can be overwritten.
        for child in sorted(_contents(path), key=lambda child: child.name == CONFIG_FILE):
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            else:
                child.unlink()
    path.mkdir(parents=True, exist_ok=True)
    return path


def remove_end(output_dir: Path, predicted: Iterable[str]) -> None:
    """Delete results, profile and predictions of a finished run that is resumed.

    If it is stopped then, its directory would pass for that of a finished run with those scores.

    predicted: names of the splits whose labels were predicted.
    """
    results = output_dir / RESULTS_FILE
    if not results.exists():
        return
    files = [output_dir / name for name in (PROFILE_FILE, TRACE_FILE)]
    for name in predicted:
        files += output_dir.glob(f"{name}_predictions.*")
    # The results last: without them nothing is known to be of the end.
    for file in (*files, results):
        file.unlink(missing_ok=True)
