"""A fixture that fills every newly allocated tensor with NaN."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ptx.driver import poison as poison_tensor
from torch import Tensor


def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_and_fill(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point():
            poison_tensor(tensor)
        return tensor

    return allocate_and_fill


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
