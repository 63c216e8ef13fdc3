"""AdamW by name, and what is told to those who have the wrong apex."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fusedacl.engine.backends.optimizers import apex_fused_adam, new_optimizer

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_adamw_keeps_each_groups_decay() -> None:
    weight, bias = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    groups: list[dict[str, Any]] = [
        {"params": [weight], "weight_decay": 0.5},
        {"params": [bias], "weight_decay": 0.0},
    ]
    made = new_optimizer("adamw", groups, 0.1, CPU)
    weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
    made.step()
    assert weight.detach()[0, 0].item() == pytest.approx(0.95)
    assert bias.detach()[0].item() == 1.0


def test_refusals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a GPU, not cpu. Use optimizer=adamw"):
        apex_fused_adam(CPU)
    # The project of that name on PyPI: a package without apex.optimizers.
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in ("apex", "apex.optimizers"):
        monkeypatch.delitem(__import__("sys").modules, module, raising=False)
    with pytest.raises(ValueError, match="is not NVIDIA's; .*PyPI.*pip uninstall apex"):
        apex_fused_adam(GPU)
    (tmp_path / "apex" / "optimizers.py").write_text("class FusedAdam: pass\n")
    __import__("importlib").invalidate_caches()
    with pytest.raises(ValueError, match="amp_C is missing"):
        apex_fused_adam(GPU)
    (tmp_path / "amp_C.py").touch()
    __import__("importlib").invalidate_caches()
    assert apex_fused_adam(GPU).__name__ == "FusedAdam"
