"""Providers of the angle check and the gated combination."""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ....kernels import gated_combine_, grad_dot_norm
from ....kernels.gradients.angle import choose
from .. import baselines
from ..suite import Call, Provider, missing

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


def _provider(name: str, call: Call, formula: str, *more: Any, **options: Any) -> Provider:
    return Provider(name, lambda case, device: call, formula, *more, **options)


def _ours(formula: str, call: Callable[..., Any]) -> list[Provider]:
    """Each implementation of ours: `call(inputs, impl=name)`."""
    return [
        _provider(
            OURS if impl == "auto" else f"{OURS} {impl}", partial(call, impl=impl), formula,
            _little, partial(_our_obstacle, impl), is_ours=True,
        )
        for impl in ("auto", "triton", "tiled", "reference")
    ]  # fmt: skip


def _of_sums() -> list[Provider]:
    others: tuple[tuple[Any, ...], ...] = (
        (baselines.concatenated_dot_norm, "concatenate + dot + norms", _flat_copies),
        (baselines.looped_dot_norm, "loop over parameters", _widened_copy),
        (baselines.foreach_dot_norm, "torch._foreach norms + dots", _widened_copy),
        (baselines.apex_dot_norm, "apex l2norm + dots", _widened_copy, _apex_obstacle),
    )
    return [
        *_ours(SUMS, partial(_sums, grad_dot_norm)),
        *(_provider(name, partial(_sums, sums), SUMS, *more) for sums, name, *more in others),
    ]


def _sums(function: Callable[..., Tensor], inputs: "AngleInputs", **options: str) -> Tensor:
    return function(inputs.a, inputs.b, **options)


def _of_combination() -> list[Provider]:
    def foreach(inputs: "AngleInputs") -> None:
        baselines.foreach_gate_(inputs.a, inputs.b, WEIGHT, inputs.one, inputs.max_norm)

    return [
        *_ours(COMBINED, lambda inputs, impl: _combine(inputs, inputs.stats, impl)),
        _provider("torch._foreach combine + clip", foreach, COMBINED, _little),
        _provider("unscale and clip alone", _unscale_and_clip, CLIPPED, _little),
    ]


def _of_gate() -> list[Provider]:
    def ours(inputs: "AngleInputs") -> Tensor:
        return _combine(inputs, grad_dot_norm(inputs.a, inputs.b), "auto")

    def concatenated(inputs: "AngleInputs") -> None:
        baselines.concatenated_gate_(inputs.a, inputs.b, WEIGHT, MAX_ANGLE, inputs.max_norm)

    return [
        _provider(OURS, ours, COMBINED, _little, is_ours=True),
        _provider("concatenate + cosine + loop", concatenated, COMBINED, _flat_copies),
        _provider(
            "TorchJD PCGrad",
            lambda inputs: baselines.stacked_pcgrad(inputs.a, inputs.b),
            PCGRAD,
            # The Jacobian, copies of its rows while it is stacked, the result.
            lambda case: 5 * case.elements * case.torch_dtype.itemsize,
            lambda case, device: missing("torchjd", "torchjd"),
        ),
        _provider(
            "TorchJD PCGrad, Gramian by tensor",
            lambda inputs: baselines.gramian_pcgrad(inputs.a, inputs.b),
            PCGRAD,
            # The Jacobians and the result.
            lambda case: 3 * case.elements * case.torch_dtype.itemsize,
            _gramian_obstacle,
        ),
        _provider("unscale and clip alone", _unscale_and_clip, CLIPPED, _little),
    ]


def _gramian_obstacle(case: "AngleCase", device: torch.device) -> str | None:
    reason = missing("torchjd", "torchjd")
    if reason is None:
        from torchjd import autojac

        found = getattr(autojac, "jac_to_grad", None)
        if found is None or "optimize_gramian_computation" not in signature(found).parameters:
            return "this torchjd has no optimize_gramian_computation. Run: pip install -U torchjd"
    return reason


def _unscale_and_clip(inputs: "AngleInputs") -> None:
    baselines.unscale_and_clip_(inputs.a, inputs.one, inputs.found_inf, inputs.max_norm)


def _combine(inputs: "AngleInputs", stats: Tensor, impl: str) -> Tensor:
    return gated_combine_(
        inputs.a, inputs.b, stats, weight=WEIGHT, max_angle=MAX_ANGLE, scale=inputs.one,
        max_norm=inputs.max_norm, impl=impl,
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
    if missing("amp_C", "apex") is None:
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
