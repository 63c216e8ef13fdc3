"""The directory of a run: refused where it holds something else, emptied where that is asked."""

from __future__ import annotations

import shutil
from pathlib import Path

from ...config.training import TrainingConfig
from ...runtime.lock import LOCK_FILE
from .checkpoint import CONFIG_FILE, PARTIAL


def check_output_dir(config: TrainingConfig) -> Path:
    """The run's directory, looked at and not touched.

    Raises:
        ValueError: it holds something and neither resuming nor overwriting was asked for, or it is
            to be overwritten and does not look like a run's.
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
        if not (path / CONFIG_FILE).exists():
            raise ValueError(
                f"overwrite_output_dir: {str(path)!r} holds files but no {CONFIG_FILE}, so it is "
                "not a run of fusedacl and is left alone. Empty it yourself."
            )
    return path


def _contents(path: Path) -> list[Path]:
    """What a directory holds, beside what a run killed at its very beginning leaves."""
    if not path.exists():
        return []
    ours = (LOCK_FILE, CONFIG_FILE + PARTIAL)
    return [child for child in path.iterdir() if child.name not in ours]


def make_output_dir(config: TrainingConfig) -> Path:
    """The run's directory, checked, emptied where that was asked for, and there."""
    path = check_output_dir(config)
    if config.run.overwrite_output_dir:
        # The file by which it is known as a run's goes last: killed here, it can be overwritten.
        for child in sorted(_contents(path), key=lambda child: child.name == CONFIG_FILE):
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            else:
                child.unlink()
    path.mkdir(parents=True, exist_ok=True)
    return path
