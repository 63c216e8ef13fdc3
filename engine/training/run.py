"""A training run from its configuration to its results."""

import contextlib
import logging
from dataclasses import asdict
from typing import Any

from ..config.fields import flatten
from ..config.training import TrainingConfig
from ..runtime import collectives, processes
from ..runtime.collectives import Peers
from ..runtime.device import set_tf32
from ..runtime.machine import versions
from .builder import RunParts, build_run, uses_deepspeed
from .trainer import Trainer

logger = logging.getLogger("fusedacl")


def train(config: TrainingConfig) -> dict[str, Any]:
    """Fine-tune an encoder as `config` says; returns what is written to `results.json`.

    If a launcher (torchrun, deepspeed) has started several processes, all of them call this.

    Raises:
        ValueError: a mistake in the configuration or the data, before any training.
        FloatingPointError: NaN or infinite representations, gradients or evaluated logits.
        OSError: the disk is full (earlier checkpoints are intact), or another process has ended.
        Interrupted: SIGINT, SIGTERM or SIGHUP came; a checkpoint was saved.
    """
    config.resolved()
    if uses_deepspeed(config):
        processes.join(config.run.device, config.run.ddp_timeout)
        alike = flatten(config) | {f"version of {name}": v for name, v in versions().items()}
        collectives.check_alike(alike)
    if processes.rank() > 0:
        logger.setLevel(logging.WARNING)
    peers = Peers()
    trainer: Trainer | None = None
    with contextlib.ExitStack() as held:
        try:
            # Not all processes may have such a GPU.
            before = collectives.together(lambda: set_tf32(config.optimization.tf32))
            held.callback(set_tf32, before)
            parts = collectives.together(lambda: build_run(config))
            held.callback(parts.lock.release)
            collectives.check_alike(
                _read_from_files(parts),
                "Copy the files of data_dir (or train_file), of deepspeed_config and of "
                "class_weights to every machine.",
            )
            trainer = collectives.together(lambda: Trainer(parts))
            return trainer.run(peers)
        except RuntimeError as error:
            explained = peers.explain(error, 0 if trainer is None else trainer.step)
            if explained is None:
                raise
            raise explained from error


def _read_from_files(parts: RunParts) -> dict[str, Any]:
    """The content of files that may differ between machines under the same names."""
    read = asdict(parts.data.record)
    for split, content in read.pop("splits").items():
        # Texts and labels by their SHA-256.
        read |= {f"{what} of {split}": value for what, value in content.items()}
    return read | {
        "deepspeed_config": parts.deepspeed_config, "class_weights": parts.class_weights
    }  # fmt: skip
