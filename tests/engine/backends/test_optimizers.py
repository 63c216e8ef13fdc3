"""What is told to those who have the wrong apex."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from fusedacl.engine.backends.optimizers import apex_fused_adam

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_refusals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a GPU, not cpu. Use optimizer=adamw"):
        apex_fused_adam(CPU)
    # The project of that name on PyPI: a package without apex.optimizers.
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in ("apex", "apex.optimizers"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ValueError, match="is not NVIDIA's; .*PyPI.*pip uninstall apex"):
        apex_fused_adam(GPU)
    (tmp_path / "apex" / "optimizers.py").write_text("class FusedAdam: pass\n")
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match="amp_C is missing"):
        apex_fused_adam(GPU)
    (tmp_path / "amp_C.py").touch()
    importlib.invalidate_caches()
    assert apex_fused_adam(GPU).__name__ == "FusedAdam"
