"""Providers of the angle check and the gated combination."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ....kernels import gated_combine_, grad_dot_norm
from ....kernels.gradients.angle import choose
from .. import baselines
from ..suite import Call, Provider, installed, missing

if TYPE_CHECKING:
    from .case import AngleCase, AngleInputs

OURS = "fusedacl"
WEIGHT = 0.02
MAX_ANGLE = 90.0

SUMS, COMBINED, CLIPPED, PCGRAD = (
    "a.b, |a|^2, |b|^2",
    "the combination, clipped",
    "a, unscaled and clipped",
    "PCGrad's sum",
)


def providers(case: "AngleCase", device: torch.device) -> list[Provider]:
    """Providers of the case's task."""
    return {"dot_norm": _of_sums, "combine": _of_combination, "gate": _of_gate}[case.task]()


def _of_sums() -> list[Provider]:
    def make(function: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]) -> Any:
        return lambda case, device: lambda inputs: function(inputs.a, inputs.b)

    others = (
        ("concatenate + dot + norms", baselines.concatenated_dot_norm, _flat_copies),
        ("loop over parameters", baselines.looped_dot_norm, _widened_copy),
        ("torch._foreach norms + dots", baselines.foreach_dot_norm, _widened_copy),
    )
    apex = make(baselines.apex_dot_norm)
    return [
        *_ours(SUMS, lambda impl: make(partial(grad_dot_norm, impl=impl))),
        *(Provider(name, make(function), SUMS, size) for name, function, size in others),
        Provider("apex l2norm + dots", apex, SUMS, _widened_copy, _apex_obstacle),
    ]


def _of_combination() -> list[Provider]:
    def foreach(inputs: "AngleInputs", one: Tensor) -> None:
        baselines.foreach_gate_(inputs.a, inputs.b, WEIGHT, one, inputs.max_norm)

    return [
        *_ours(COMBINED, lambda impl: _scaled(partial(_combine, impl=impl))),
        Provider("torch._foreach combine + clip", _scaled(foreach), COMBINED, _little),
        Provider("unscale and clip alone", _unscale_and_clip, CLIPPED, _little),
    ]


def _of_gate() -> list[Provider]:
    def ours(inputs: "AngleInputs", one: Tensor) -> Tensor:
        return _combine(inputs, one, grad_dot_norm(inputs.a, inputs.b))

    def concatenated(inputs: "AngleInputs", one: Tensor) -> None:
        baselines.concatenated_gate_(inputs.a, inputs.b, WEIGHT, MAX_ANGLE, inputs.max_norm)

    return [
        Provider(OURS, _scaled(ours), COMBINED, _little, is_ours=True),
        Provider("concatenate + cosine + loop", _scaled(concatenated), COMBINED, _flat_copies),
        Provider(
            "TorchJD PCGrad",
            lambda case, device: lambda inputs: baselines.stacked_pcgrad(inputs.a, inputs.b),
            PCGRAD,
            # The Jacobian, copies of its rows while it is stacked, the result.
            lambda case: 5 * case.elements * case.torch_dtype.itemsize,
            lambda case, device: missing("torchjd", "torchjd"),
        ),
        Provider("unscale and clip alone", _unscale_and_clip, CLIPPED, _little),
    ]


def _ours(formula: str, make: Callable[[str], Any]) -> list[Provider]:
    """Each implementation of ours; `make` takes its name."""
    return [
        Provider(
            OURS if impl == "auto" else f"{OURS} {impl}", make(impl), formula, _little,
            partial(_our_obstacle, impl), is_ours=True,
        )
        for impl in ("auto", "triton", "tiled", "reference")
    ]  # fmt: skip


def _scaled(function: Callable[["AngleInputs", Tensor], Any]) -> Any:
    """Maker of a call of `function(inputs, one)`; one: a loss scale of 1 on the device."""

    def make(case: "AngleCase", device: torch.device) -> Call:
        one = torch.ones((), device=device)
        return lambda inputs: function(inputs, one)

    return make


def _unscale_and_clip(case: "AngleCase", device: torch.device) -> Call:
    one, found_inf = torch.ones(1, device=device), torch.zeros(1, device=device)
    return lambda inputs: baselines.unscale_and_clip_(inputs.a, one, found_inf, inputs.max_norm)


def _combine(
    inputs: "AngleInputs", one: Tensor, stats: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    return gated_combine_(
        inputs.a, inputs.b, inputs.stats if stats is None else stats, weight=WEIGHT,
        max_angle=MAX_ANGLE, scale=one, max_norm=inputs.max_norm, impl=impl,
    )  # fmt: skip


def _our_obstacle(impl: str, case: "AngleCase", device: torch.device) -> str | None:
    if impl == "auto":
        return None
    try:
        choose(impl, device)
    except ValueError as error:
        return str(error)
    if choose("auto", device) == impl:
        return f"same as {OURS}, which chooses it here"
    return None


def _apex_obstacle(case: "AngleCase", device: torch.device) -> str | None:
    if device.type != "cuda":
        return "apex's kernels run on NVIDIA GPUs only: --device cuda"
    if installed("amp_C"):
        return missing("apex", "apex")
    return (
        "apex with its kernels is not installed. Run: pip install --no-build-isolation "
        "--config-settings '--build-option=--cpp_ext' --config-settings "
        "'--build-option=--cuda_ext' git+https://github.com/NVIDIA/apex"
    )


def _little(case: "AngleCase") -> int:
    """Bytes of partial sums."""
    return 2**20 + case.elements // 2**10


def _flat_copies(case: "AngleCase") -> int:
    """Bytes of both lists as flat copies, with float32 copies of 16-bit gradients."""
    size = case.torch_dtype.itemsize
    return 2 * case.elements * (size + (0 if size >= 4 else 4))


def _widened_copy(case: "AngleCase") -> int:
    """Bytes of float32 copies of the largest 16-bit tensors."""
    return 2**20 + (0 if case.torch_dtype.itemsize >= 4 else 3 * case.elements)
