"""Cases of `counts`: the contrastive losses and the gradient check, on the CPU.

With Triton's interpreter, the GPU's Triton kernels are counted too.
"""

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed, nn

from ...engine.runtime.device import dtype_name
from ...kernels import acl_cl_loss, acl_loss, gated_combine_, grad_dot_norm, supcon_loss
from ...kernels.support.c_loops import library
from ...kernels.support.machine import interpreting, triton_obstacle

CPU = torch.device("cpu")
LOSSES: dict[str, Callable[..., Tensor]] = {
    "scl": supcon_loss,
    "acl": acl_loss,
    "acl_cl": acl_cl_loss,
}
WIDTH = 64
# A GLUE batch, and a batch that the CPU's loop for many rows and several launches on a GPU compute.
SMALL = {"num_samples": 32, "num_labels": 2}
LARGE = {"num_samples": 1500, "num_labels": 36}
EXITS = 5
# Batch sizes of a training run vary; the compiled kernels should not.
SMALL_SIZES = (9, 16, 30, 31, 32, 64)
LARGE_SIZES = (997, 1000, 1001, 1008, 1024, 1500)
NUM_RANKS = 4


@dataclass(frozen=True)
class Subject:
    """The call to count, and the modules whose forward calls are counted."""

    call: Callable[[], object]
    watched: Mapping[str, Sequence[nn.Module]] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One row of the table.

    prepare: makes the subject; it may write into the directory, which the cases share.
    obstacle: a message if the case cannot be counted here, else None.
    """

    name: str
    prepare: Callable[[Path], Subject]
    obstacle: Callable[[], str | None] = lambda: None


def kernel_cases() -> list[Case]:
    return [
        _loss("scl", "tiled", SMALL),
        _loss("acl", "tiled", SMALL),
        _loss("acl_cl", "tiled", SMALL, exits=EXITS),
        _loss("scl", "tiled", LARGE),
        _loss("acl", "tiled", LARGE),
        _loss("acl_cl", "tiled", LARGE),
        _loss("acl", "tiled", LARGE, reduction="none"),
        # PyTorch's tiles, which float32 takes on a GPU and where there is no compiler.
        _loss("scl", "tiled", LARGE, dtype=torch.float64),
        Case(f"acl tiled, {NUM_RANKS} ranks", _global_loss, _no_stand_in_for_ranks),
        Case("gradient check tiled, MiniLM", partial(_gradient_check, "tiled"), no_compiled_loop),
        _loss("scl", "triton", SMALL),
        _loss("acl", "triton", SMALL),
        _loss("acl_cl", "triton", SMALL, exits=EXITS),
        _loss("acl", "triton", SMALL, reduction="none"),
        _sizes(SMALL_SIZES, SMALL["num_labels"]),
        _loss("scl", "triton", LARGE),
        _loss("acl", "triton", LARGE),
        _loss("acl_cl", "triton", LARGE, exits=EXITS),
        _loss("acl", "triton", LARGE, reduction="none"),
        _sizes(LARGE_SIZES, LARGE["num_labels"]),
        Case("gradient check triton, MiniLM", partial(_gradient_check, "triton"), no_interpreter),
    ]


def _loss(
    name: str,
    impl: str,
    shape: dict[str, int],
    *,
    exits: int | None = None,
    reduction: str = "sum",
    dtype: torch.dtype = torch.float32,
) -> Case:
    num_samples, num_labels = shape["num_samples"], shape["num_labels"]
    words = f"{name} {impl}, N {num_samples}"
    words += "" if name == "scl" else f", K {num_labels}"
    words += "" if exits is None else f", E {exits}"
    words += "" if reduction == "sum" else f", reduction {reduction}"
    words += "" if dtype == torch.float32 else f", {dtype_name(dtype)}"

    def prepare(directory: Path) -> Subject:
        inputs = _inputs(name, num_samples, num_labels, exits, dtype)
        call = partial(_forward_backward, LOSSES[name], *inputs, reduction=reduction, impl=impl)
        return Subject(call)

    return Case(words, prepare, no_interpreter if impl == "triton" else no_compiled_loop)


def _sizes(sizes: Sequence[int], num_labels: int) -> Case:
    def prepare(directory: Path) -> Subject:
        batches = [_inputs("acl", size, num_labels) for size in sizes]

        def call() -> None:
            for batch in batches:
                _forward_backward(acl_loss, *batch, reduction="sum", impl="triton")

        return Subject(call)

    words = f"acl triton, {len(sizes)} sizes, N {min(sizes)} to {max(sizes)}"
    return Case(words, prepare, no_interpreter)


def _inputs(
    name: str,
    num_samples: int,
    num_labels: int,
    exits: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[Tensor], Tensor]:
    """Embeddings and the loss's other rows; labels [N]."""
    generator = torch.Generator().manual_seed(0)
    leading = () if exits is None else (exits,)

    def rows(*shape: int) -> Tensor:
        return torch.randn(*shape, WIDTH, generator=generator).to(dtype)

    inputs = [rows(*leading, num_samples).requires_grad_()]
    if name != "scl":
        inputs.append(rows(*leading, num_labels).requires_grad_())
    if name == "acl_cl":
        inputs += [rows(num_samples), rows(num_labels)]
    return inputs, torch.arange(num_samples) % num_labels


def _forward_backward(
    loss: Callable[..., Tensor], inputs: list[Tensor], labels: Tensor, **options: Any
) -> None:
    embeddings, *others = inputs
    value = loss(embeddings, labels, *others, **options)
    trained = [tensor for tensor in inputs if tensor.requires_grad]
    torch.autograd.grad(value, trained, torch.ones_like(value))


def _global_loss(directory: Path) -> Subject:
    """One rank of a loss over a fake group, whose other ranks send what this one sends."""
    inputs = _inputs("acl", SMALL["num_samples"], SMALL["num_labels"])

    def call() -> None:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        # init_process_group replaces the exception hook and does not restore it.
        with mock.patch.object(sys, "excepthook", sys.excepthook):
            distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=NUM_RANKS)
            try:
                group = distributed.group.WORLD
                _forward_backward(acl_loss, *inputs, process_group=group, impl="tiled")
            finally:
                distributed.destroy_process_group()

    return Subject(call)


def _gradient_check(impl: str, directory: Path) -> Subject:
    """Both gradient functions over equal gradients in MiniLM's shapes, unscaled and clipped."""
    from transformers import BertConfig, BertModel

    minilm = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    with torch.device("meta"):
        shapes = [parameter.shape for parameter in BertModel(minilm).parameters()]
    a, b = ([torch.ones(shape) for shape in shapes] for _ in range(2))

    def call() -> None:
        stats = grad_dot_norm(a, b, impl=impl)
        gated_combine_(a, b, stats, weight=0.02, scale=0.5, max_norm=1.0, impl=impl)

    return Subject(call)


def no_interpreter() -> str | None:
    if interpreting():
        return triton_obstacle(CPU)
    return "Triton's interpreter is off (TRITON_INTERPRET=1 in the environment turns it on)"


def no_compiled_loop() -> str | None:
    loops = ("gradients._cpu_loop", "contrastive.tiled._cpu_loop")
    if all(library(loop) is not None for loop in loops):
        return None
    return "fusedacl was installed without its compiled loops (they need a C compiler)"


def _no_stand_in_for_ranks() -> str | None:
    if not distributed.is_available():
        return "this torch is built without distributed"
    if importlib.util.find_spec("torch.testing._internal.distributed.fake_pg") is None:
        return "this torch has no fake process group"
    if distributed.is_initialized():
        return "this process is part of a process group already"
    return None
