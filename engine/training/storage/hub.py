"""The final model on the Hugging Face hub."""

import logging
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi

from ...config.run_options import RunOptions
from ...runtime.text import first_line

logger = logging.getLogger("fusedacl")


def open_repository(options: RunOptions) -> str:
    """Create the repository, if it is not there, and return its whole name.

    Before training, so that nobody finds out afterwards that they may not write there.

    Raises:
        ValueError: the hub is out of reach, or nobody is logged in, or may not write there.
    """
    name = options.hub_model_id or Path(str(options.output_dir)).resolve().name
    try:
        made = HfApi().create_repo(name, private=options.hub_private_repo, exist_ok=True)
    except Exception as error:
        # The hub's client and the libraries below it raise errors of their own.
        raise ValueError(
            f"push_to_hub: the repository {name!r} cannot be opened: {first_line(error)} Log in "
            "with `hf auth login` (or set HF_TOKEN) as somebody who may write there, or leave "
            "push_to_hub out."
        ) from None
    return made.repo_id


def push(output_dir: Path, files: Sequence[str], repository: str) -> None:
    """Upload files of a finished run.

    Raises:
        OSError: the hub did not take them; they are in the output directory.
    """
    try:
        HfApi().upload_folder(
            repo_id=repository,
            folder_path=output_dir,
            allow_patterns=list(files),
            commit_message="Model trained by fusedacl",
        )
    except Exception as error:
        raise OSError(
            f"push_to_hub: {repository} did not take the model: {error}. It is in "
            f"{str(output_dir)!r}; upload it with `hf upload {repository} {output_dir}`."
        ) from error
    logger.info("The model is on the hub: %s.", repository)
