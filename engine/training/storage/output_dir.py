"""The output directory of a run: checks of its contents, and emptying it if that was asked."""

import shutil
from pathlib import Path

from ...config.training import TrainingConfig
from ...runtime.lock import LOCK_FILE
from .checkpoint import CONFIG_FILE, PARTIAL


def check_output_dir(config: TrainingConfig) -> Path:
    """The path of the output directory, which is checked but not changed.

    Raises:
        ValueError: it is not empty and neither resuming nor overwriting was asked for, or it is to
            be overwritten and does not hold a run.
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
