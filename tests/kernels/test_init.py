"""Import of the package: loaded modules, and Hugging Face's distribution `kernels`."""

import os
import subprocess
import sys
from pathlib import Path

import fusedacl.kernels
import pytest

ROOT = Path(fusedacl.kernels.__file__).parents[1]
PROGRAM = """
import sys
from transformers import BertConfig, BertModel
import kernels
BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                     intermediate_size=8, vocab_size=5))
from fusedacl.kernels import acl_loss
print(sys.path[0] == "", getattr(kernels, "__file__", None))
"""
STAND_IN = """
class _Anything:
    def __init__(self, *args, **kwargs): pass
    def __call__(self, *args, **kwargs): return args[0] if args else None
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything
"""


@pytest.mark.parametrize("installed", [True, False], ids=["installed", "absent"])
def test_transformers_imports_from_the_root(tmp_path: Path, installed: bool) -> None:
    """`python -c` puts the working directory first on sys.path, ahead of site-packages."""
    stand_in = tmp_path / "kernels" / "__init__.py"
    if installed:
        stand_in.parent.mkdir()
        stand_in.write_text(STAND_IN)
        metadata = tmp_path / "kernels-0.10.0.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.10.0\n")
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["True", str(stand_in) if installed else "None"]


def test_import_loads_nothing_beside_torch() -> None:
    """Importing torch._dynamo, sympy or triton takes as long as importing torch does."""
    program = """
import sys, torch
before = set(sys.modules)
import fusedacl.kernels
new = {name for name in sys.modules if name not in before and not name.startswith("fusedacl")}
print(*sorted(new))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
