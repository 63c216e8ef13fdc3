"""The public names resolve, and naming them costs nothing before they are used."""

import subprocess
import sys

import fusedacl.engine
import pytest


def test_every_public_name_resolves() -> None:
    for name in fusedacl.engine.__all__:
        assert getattr(fusedacl.engine, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        fusedacl.engine.trian  # noqa: B018


def test_help_and_a_mistyped_flag_do_not_wait_for_torch() -> None:
    code = """
import sys
from fusedacl.engine.cli.main import main

assert main(["--help"]) == 0
for words in (["train"], ["evaluate"], ["predict"], ["exits"], ["angles", "run"], ["tsne", "run"]):
    assert main([*words, "--taks_name", "x"]) == 2
assert main(["sweep", "minilm_lambda", "--taks_name", "x"]) == 2
assert not {"torch", "transformers", "datasets", "matplotlib"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
