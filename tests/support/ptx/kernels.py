"""The project's kernels on the machine: impl="triton" with tensors on the CPU runs their PTX."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Read when the kernels are imported; any other value would be "1", from tests/conftest.py.
os.environ["TRITON_INTERPRET"] = "0"

from fusedacl.kernels.support import machine

from .driver import Driver, install, poison


def run_on_machine(capability: int, **options: bool) -> Driver:
    """Installs the driver; the kernels take the CPU for a GPU of this compute capability.

    Every tensor that is allocated without a value is poisoned. options: of `machine.Launch`.
    TRITON_CACHE_DIR must name a directory without binaries.
    """
    driver = install(capability, **options)
    replace_everywhere(machine.capability, lambda device: driver.capability)
    for name in ("empty", "empty_like", "empty_strided"):
        setattr(torch, name, poisoned(getattr(torch, name)))
    Tensor.new_empty = poisoned(Tensor.new_empty)
    return driver


def replace_everywhere(old: object, new: object) -> None:
    """In all of the project's modules, which may have imported the name."""
    for name, module in list(sys.modules.items()):
        if name.startswith("fusedacl."):
            for attribute, value in list(vars(module).items()):
                if value is old:
                    setattr(module, attribute, new)


def poisoned(allocate: Callable[..., Any]) -> Callable[..., Any]:
    def allocate_and_poison(*args: Any, **kwargs: Any) -> Any:
        tensor = allocate(*args, **kwargs)
        # A subclass stands in for a tensor while a graph is traced.
        if type(tensor) is Tensor and tensor.device.type == "cpu":
            poison(tensor)
        return tensor

    return allocate_and_poison
