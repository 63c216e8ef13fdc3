import pytest
import torch
import triton
from fusedacl.kernels.support import machine
from fusedacl.kernels.support.machine import triton_obstacle

CPU = torch.device("cpu")
GPU = torch.device("cuda")


def test_what_keeps_triton_from_running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def reason(device: torch.device) -> str:
        return triton_obstacle(device) or ""

    assert "on the cpu and Triton needs an NVIDIA GPU (TRITON_INTERPRET=1" in reason(CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert "compute capability 6.1 is too old: Triton needs 7.0" in reason(GPU)
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert "built for ROCm" in reason(GPU)
    monkeypatch.setattr(machine, "triton_version", lambda: (3, 1))
    assert "Triton 3.1 is too old: 3.3 or newer is needed" in reason(GPU)
    monkeypatch.setattr(machine, "triton_version", lambda: None)
    assert "Triton is not installed" in reason(GPU)


def test_the_mark_for_torch_compile_is_the_official_one() -> None:
    def ours() -> None: ...

    def official() -> None: ...

    machine.assume_constant_result(ours)
    torch.compiler.assume_constant_result(official)
    assert vars(ours) == vars(official) != {}


def test_the_installed_version_is_read() -> None:
    assert machine.triton_version() == tuple(map(int, triton.__version__.split(".")[:2]))
