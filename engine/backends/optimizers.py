"""AdamW by name: PyTorch's, or NVIDIA apex's fused one where it is really there."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch.nn import Parameter

OPTIMIZERS = ("adamw", "apex_fused_adam")
APEX_SOURCE = "https://github.com/NVIDIA/apex"


def new_optimizer(
    name: str, parameter_groups: list[dict[str, Any]], learning_rate: float, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW over parameter groups, each with its own weight_decay.

    Raises:
        ValueError: an unknown name, or apex's FusedAdam where it cannot run.
    """
    if name == "adamw":
        return torch.optim.AdamW(parameter_groups, lr=learning_rate, fused=True)
    if name != "apex_fused_adam":
        raise ValueError(f"optimizer={name!r} is not one of {', '.join(OPTIMIZERS)}.")
    return apex_fused_adam(device)(parameter_groups, lr=learning_rate, adam_w_mode=True)


def apex_fused_adam(device: torch.device) -> Any:
    """The class apex.optimizers.FusedAdam.

    Raises:
        ValueError: no GPU, no apex, another project of that name, or apex without its kernels.
    """
    remedy = "Use optimizer=adamw (fused in PyTorch), or build NVIDIA apex from " + APEX_SOURCE
    if device.type != "cuda":
        raise ValueError(f"optimizer=apex_fused_adam needs a GPU, not {device.type}. {remedy}.")
    if importlib.util.find_spec("apex") is None:
        raise ValueError(f"optimizer=apex_fused_adam: apex is not installed. {remedy}.")
    try:
        optimizers = importlib.import_module("apex.optimizers")
    except ImportError:
        raise ValueError(
            "optimizer=apex_fused_adam: the installed package 'apex' is not NVIDIA's; the one of "
            f"that name on PyPI is another project. pip uninstall apex. {remedy}."
        ) from None
    # apex imports without its kernels, and fails at the first step.
    if importlib.util.find_spec("amp_C") is None:
        raise ValueError(
            "optimizer=apex_fused_adam: apex was built without its CUDA extensions (amp_C is "
            f"missing). {remedy}, with --cpp_ext --cuda_ext."
        )
    return optimizers.FusedAdam


def decay_groups(parameters: list[Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups: matrices decay; biases and norms, which are vectors, do not."""
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
