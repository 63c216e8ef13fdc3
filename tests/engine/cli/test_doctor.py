"""The report of doctor on this machine and on others."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from fusedacl.engine.cli import doctor
from fusedacl.engine.runtime import machine


def test_says_what_this_machine_can_run() -> None:
    text = "\n".join(doctor.diagnose())
    assert f"torch {torch.__version__}" in text
    for heading in ("Device", "Arithmetic", "Implementation of each kernel", "Versions", "Extras"):
        assert f"\n{heading}\n" in text
    assert re.search("contrastive loss on (cpu|cuda)", text) and "tiled" in text


def test_imports_at_most_half_more_than_torch_and_the_kernels() -> None:
    code = """
import sys
import fusedacl.kernels

needed = len(sys.modules)
from fusedacl.engine.cli.doctor import diagnose

diagnose()
assert len(sys.modules) <= 1.5 * needed, (len(sys.modules), needed)
absent = {"transformers", "datasets", "deepspeed", "matplotlib", "sklearn", "pandas"}
assert not absent & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_arithmetic_follows_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for major, expected in ((7, "--bf16 is refused"), (9, "--bf16 (no loss scaling)")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda m=major: (m, 0))
        assert expected in doctor._arithmetic()


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (set(), "absent. Optional"),
        ({"apex", "amp_C", "apex.multi_tensor_apply"}, "NVIDIA's, with its CUDA extensions"),
        ({"apex", "apex.multi_tensor_apply"}, "built without CUDA extensions"),
        ({"apex"}, "WRONG PROJECT"),
    ],
)
def test_tells_the_two_apexes_apart(
    modules: set[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(name: str) -> ModuleSpec | None:
        return ModuleSpec(name, None) if name in modules else None

    monkeypatch.setattr(importlib.util, "find_spec", find)
    assert expected in doctor._apex()


def test_cores_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5}, raising=False)
    assert machine.num_cores() == 2 and doctor._device()[0].startswith("  CPU: 2 cores, ")
    # Other systems than Linux do not say.
    monkeypatch.delattr(os, "sched_getaffinity")
    assert machine.num_cores() == 64
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert machine.num_cores() == 1


def test_absent_packages_are_left_out_of_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == "deepspeed":
            raise PackageNotFoundError(package)
        return "1.2"

    for number, words in (
        (version, "absent. Several processes need it: pip install"),
        (lambda package: "0.9.1", "0.9.1, which is not supported."),
    ):
        monkeypatch.setattr(machine, "version", number)
        monkeypatch.setattr(importlib.metadata, "version", number)
        assert doctor._deepspeed().startswith(f"DeepSpeed: {words}")
        assert ("deepspeed" in machine.versions()) == (number is not version)
        assert machine.versions()["torch"] == number("torch")
