"""Encoders of transformers: pretrained or random weights, and their dropout."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

# Names of dropout probabilities in the configurations of transformers.
_DROPOUT_NAMES = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "dropout",
    "attention_dropout",
    "embedding_dropout",
    "mlp_dropout",
    "hidden_dropout",
    "embd_pdrop",
)


def set_dropout(config: PretrainedConfig, probability: float) -> None:
    """Set every dropout probability in an encoder's configuration.

    Raises:
        ValueError: the configuration has no dropout setting of a known name.
    """
    names = [
        name for name in _DROPOUT_NAMES if isinstance(getattr(config, name, None), float | int)
    ]
    if not names:
        raise ValueError(
            f"dropout={probability}: a {config.model_type} encoder has no dropout setting that is "
            "known here; leave dropout out."
        )
    for name in names:
        setattr(config, name, probability)


def _encoder_options(config: PretrainedConfig) -> dict[str, Any]:
    """Options that leave out the pooler: it would be saved with the model and never trained."""
    encoder_class: Any = AutoModel._model_mapping.get(type(config), None)
    if encoder_class is None:
        return {}
    has_pooler = "add_pooling_layer" in inspect.signature(encoder_class).parameters
    return {"add_pooling_layer": False} if has_pooler else {}


def random_encoder(config: PretrainedConfig) -> PreTrainedModel:
    """Make an encoder with random weights."""
    return AutoModel.from_config(config, **_encoder_options(config))


def pretrained_encoder(name_or_path: str, config: PretrainedConfig) -> PreTrainedModel:
    """Load an encoder's weights in float32, from the hub or a local directory."""
    # transformers would report the weights of the pooler and the pretraining head as unused.
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            return AutoModel.from_pretrained(
                name_or_path, config=config, dtype=torch.float32, **_encoder_options(config)
            )
    finally:
        transformers_logging.set_verbosity(level)
