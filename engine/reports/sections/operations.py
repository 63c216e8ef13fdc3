"""Floating-point operations of saved models, from their configuration alone."""

from __future__ import annotations

from pathlib import Path

import torch

from ...model.exit_policies import FixedLayer
from ...model.flops import exit_flops, full_flops
from ...model.multi_exit import MultiExitConfig, MultiExitForSequenceClassification
from ...model.saved import DEFAULT_MAX_LENGTH


def operations(directory: Path, layer: int | None = None) -> tuple[float, int]:
    """FLOPs on a text of the model's max_seq_length tokens, and that length.

    Args:
        directory: of a saved model; its weights are not read.
        layer: what a model that ends with the exit there would do; None: with the last exit.

    Raises:
        ValueError: there is no model, it has no such exit, or its encoder is not known here.
    """
    if not (directory / "config.json").is_file():
        raise ValueError("no model is saved with the run")
    config = MultiExitConfig.from_pretrained(directory)
    length = int(config.max_seq_length or DEFAULT_MAX_LENGTH)
    with torch.device("meta"):
        model = MultiExitForSequenceClassification(config)
    if layer is None or layer == model.exit_layers[-1]:
        flops = full_flops(model)
    elif layer in model.exit_layers:
        flops = exit_flops(model, FixedLayer(layer))[model.exit_layers.index(layer)]
    else:
        raise ValueError(f"the model has no exit on layer {layer}")
    return float(flops.at(torch.tensor([length]))[0]), length
