"""The angle between two lists of gradients and their gated combination, in one pass each.

    stats = (a . b, |a|^2, |b|^2)          angle = acos(a . b / (|a| |b|)) in degrees
    l'    = weight if angle <= max_angle else 0
    a    <- scale ((1 - l') a + l' b)

Source: arXiv 2602.03563, equations 2 and 4 (ACL-Grad).
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..support.machine import triton_obstacle
from ..support.memory import has_memory
from ..support.names import check_name
from . import cpu, reference
from .reference import Gate, Gradients

IMPLEMENTATIONS = ("auto", "reference", "tiled", "triton")


def grad_dot_norm(
    a: Gradients, b: Gradients, *, groups: Sequence[int] | None = None, impl: str = "auto"
) -> Tensor:
    """Return (a . b, |a|^2, |b|^2) of two lists of gradients per group.

    Args:
        a, b: lists of equal length; entry i has the same shape in both. None stands for zeros.
        groups: group 0..G-1 of every entry; None: one group.
        impl: "triton" reads both lists once in one launch (GPU); "tiled" reads them once (CPU);
            "reference" makes three passes on any device; "auto" chooses by the device. On a GPU
            none waits for the device.

    Returns:
        [G, 3] float32, accumulated in float64 over chunks of float32 sums (of float64 sums for
        float64 gradients). The same call gives the same bits.

    Raises:
        TypeError, ValueError: the message names the entry and a remedy.
    """
    device, num_groups = _check_lists(a, b, groups)
    module = _module(choose(impl, device, a, b))
    return module.grad_dot_norm(a, b, groups, num_groups)


def gated_combine_(
    a: Gradients,
    b: Gradients,
    stats: Tensor,
    *,
    weight: float,
    max_angle: float = 90.0,
    scale: float | Tensor | None = None,
    max_norm: float | None = None,
    clip_groups: bool = False,
    groups: Sequence[int] | None = None,
    impl: str = "auto",
) -> Tensor:
    """Set a to scale ((1 - l') a + l' b) in place; l' = weight where the angle is small enough.

    Args:
        a, b: as in `grad_dot_norm`; an entry of `a` may be None only if that of `b` is None too.
        stats: [G, 3] from `grad_dot_norm` for the same lists and groups.
        weight: l' in [0, 1] of groups whose gradients agree; of the others l' = 0.
        max_angle: largest angle in degrees, in [0, 180], at which gradients agree. The angle to a
            zero gradient is 90.
        scale: factor of the result (to remove a loss scale): a number or a tensor of one element.
            If it is NaN, no gradient is written.
        max_norm: clip the scaled result of all groups together to this norm. If the stats of any
            group are not finite there is no norm, and no gradient is written.
        clip_groups: clip each group by its own norm instead: only a group whose stats are not
            finite keeps its gradients.
        groups, impl: as in `grad_dot_norm`.

    Returns:
        [G] float32: the l' used. NaN where the stats are not finite: that group has no angle and
        keeps its gradients, so the caller must skip the step.

    Raises:
        TypeError, ValueError: the message names the argument and a remedy.
    """
    device, num_groups = _check_lists(a, b, groups)
    if tuple(stats.shape) != (num_groups, 3):
        raise ValueError(
            f"stats has shape {tuple(stats.shape)}: {num_groups} group(s) need [{num_groups}, 3], "
            "as grad_dot_norm returns for the same lists and groups"
        )
    if stats.device != device:
        raise ValueError(
            f"stats is on {stats.device} and the gradients on {device}: pass what grad_dot_norm "
            "returned for them"
        )
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            raise ValueError(
                f"scale has shape {tuple(scale.shape)}: pass a number or a tensor of one element"
            )
        if scale.device.type != "cpu" and scale.device != device:
            raise ValueError(f"scale is on {scale.device} and the gradients on {device}: move it")
    if not 0 <= weight <= 1:
        raise ValueError(f"weight is {weight}: it must lie in [0, 1]")
    if not 0 <= max_angle <= 180:
        raise ValueError(f"max_angle is {max_angle}: it must lie in [0, 180] degrees")
    for index, (left, right) in enumerate(zip(a, b, strict=True)):
        if left is None and right is not None:
            raise ValueError(
                f"a[{index}] is None but b[{index}] is not: there is nothing to write to "
                "(torch.zeros_like(b[i]) makes a place)"
            )
        if left is not None and _is_expanded(left):
            raise ValueError(
                f"a[{index}] has shape {tuple(left.shape)} and strides {left.stride()}: several of "
                "its elements share one place, so nothing can be written to it (.clone() it)"
            )
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm is {max_norm}: it must be > 0, or None for no clipping")
    gate = Gate(weight, max_angle, scale, max_norm, clip_groups)
    name = choose(impl, device, a, b)
    module = _module(name)
    if name == "triton":
        return module.gated_combine_(a, b, stats, gate, groups, num_groups)
    used, factor = _decide(stats, gate)
    with torch.no_grad():
        module.gated_combine_(a, b, used, factor, groups)
    return used.float()


def angle_degrees(stats: Tensor) -> Tensor:
    """Return the angle [G] in degrees, float32, from the [G, 3] of `grad_dot_norm`.

    90 where a gradient is zero, NaN where the stats are not finite. Does not wait for the device.

    Raises:
        ValueError: stats has another shape.
    """
    return _angle(stats).float()


def within_angle(stats: Tensor, max_angle: float) -> Tensor:
    """Return whether the angle is at most `max_angle` degrees, bool [G]: the gate's decision.

    Computed in float64, whereas `angle_degrees` is rounded. False where the stats are not finite.

    Raises:
        ValueError: stats has another shape than [G, 3].
    """
    return _angle(stats) <= max_angle


def combined_squared_norm(stats: Tensor, used: Tensor) -> Tensor:
    """Return |(1 - l') a + l' b|^2 [G], float32, before any scale, without another pass.

    Args:
        stats: [G, 3] from `grad_dot_norm`.
        used: l' [G] from `gated_combine_`; a NaN stays NaN.

    Raises:
        ValueError: stats or used has another shape.
    """
    dot, a_squared, b_squared = _columns(stats)
    if used.shape != dot.shape:
        raise ValueError(
            f"used has shape {tuple(used.shape)}: stats has {len(dot)} group(s), so it must be "
            f"[{len(dot)}], as gated_combine_ returned"
        )
    used = used.double()
    kept = 1 - used
    squared = kept.square() * a_squared + 2 * used * kept * dot + used.square() * b_squared
    return squared.clamp(min=0).float()


def _angle(stats: Tensor) -> Tensor:
    # In float64 acos(0) is exactly 90 degrees, so that a threshold of 90 accepts it.
    dot, a_squared, b_squared = _columns(stats)
    product = a_squared.sqrt() * b_squared.sqrt()
    cosine = (dot / product).masked_fill(product == 0, 0).clamp(-1, 1)
    return torch.rad2deg(torch.acos(cosine)).masked_fill(~stats.isfinite().all(1), torch.nan)


def _columns(stats: Tensor) -> tuple[Tensor, ...]:
    """a . b, |a|^2 and |b|^2 [G], in float64."""
    if stats.dim() != 2 or stats.shape[1] != 3:
        raise ValueError(
            f"stats has shape {tuple(stats.shape)}: pass the [G, 3] that grad_dot_norm returned"
        )
    return stats.double().unbind(1)


def _decide(stats: Tensor, gate: Gate) -> tuple[Tensor, Tensor]:
    """Return l' [G] and the factors [G], both float64, on the device."""
    used = within_angle(stats, gate.max_angle).double() * gate.weight
    used = used.masked_fill(~stats.isfinite().all(1), torch.nan)
    factor, scale = torch.ones_like(used), gate.scale
    if scale is not None:
        factor = factor * (scale.to(factor) if isinstance(scale, Tensor) else scale)
    if gate.max_norm is not None:
        # In float64, because the norm of float16 gradients with their loss scale may be huge.
        squared = combined_squared_norm(stats, used).double()
        norm = (squared if gate.clip_groups else squared.sum()).sqrt() * factor.abs()
        factor = factor * (gate.max_norm / (norm + 1e-6)).clamp(max=1)
    return used, factor


def choose(impl: str, device: torch.device, a: Gradients = (), b: Gradients = ()) -> str:
    """Return "reference", "tiled" or "triton"; ValueError if `impl` cannot run."""
    check_name("impl", impl, IMPLEMENTATIONS)
    on_cpu = device.type == "cpu"
    if impl == "auto":
        if on_cpu:
            return "tiled"
        return "triton" if _triton_obstacle(device, a, b) is None else "reference"
    if impl == "triton":
        reason = _triton_obstacle(device, a, b)
        if reason is not None:
            raise ValueError(f"impl='triton' cannot run: {reason}")
    if impl == "tiled" and not on_cpu:
        raise ValueError(
            f"impl='tiled' cannot run: it is for the CPU, and the gradients are on {device} "
            "(impl='reference' runs anywhere)"
        )
    return impl


def _module(name: str) -> ModuleType:
    if name == "triton":
        from . import gpu

        return gpu
    return cpu if name == "tiled" else reference


def _triton_obstacle(device: torch.device, a: Gradients, b: Gradients) -> str | None:
    reason = triton_obstacle(device)
    return _module("triton").obstacle(a, b) if reason is None else reason


def explain(device: torch.device) -> str:
    """Describe in one line what impl="auto" chooses on this device."""
    name = choose("auto", device)
    compiled = "a compiled loop, one pass over memory"
    chunks = (
        "products of chunks that stay in cache (a compiled loop is faster: it is built when "
        "fusedacl is installed on a machine with a C compiler)"
    )
    how = {
        "reference": "three passes of torch.dot",
        "tiled": chunks if cpu.compiled_loop() is None else compiled,
        "triton": "one launch, one pass over memory",
    }[name]
    reason = None if name == "triton" else triton_obstacle(device)
    why = "" if reason is None else f"; triton cannot run: {reason}"
    return f"gradient dot and norms on {device.type}: {name}, {how}{why}"


def _check_lists(
    a: Gradients, b: Gradients, groups: Sequence[int] | None
) -> tuple[torch.device, int]:
    """Return the device of the gradients (the CPU if all are None) and the number of groups."""
    if len(a) != len(b):
        raise ValueError(
            f"a has {len(a)} entries and b {len(b)}: they must be equally long, with None for a "
            "parameter that a loss does not reach"
        )
    if len(a) == 0:
        raise ValueError("a and b are empty: pass the gradients of at least one parameter")
    device = reference.device_of(a, b)
    for index, (left, right) in enumerate(zip(a, b, strict=True)):
        # There are hundreds of entries per step: one quick check each, the message only on failure.
        for side, tensor in (("a", left), ("b", right)):
            if not _is_gradient(tensor, device):
                _refuse(f"{side}[{index}]", tensor, device)
        if left is not None and right is not None and left.shape != right.shape:
            raise ValueError(
                f"a[{index}] has shape {tuple(left.shape)} and b[{index}] {tuple(right.shape)}: "
                "both must be gradients of the same parameter"
            )
    num_groups = 1
    if groups is not None:
        if len(groups) != len(a):
            raise ValueError(
                f"groups has {len(groups)} entries and a {len(a)}: it needs one per gradient"
            )
        if set(map(type, groups)) != {int} or min(groups) < 0:
            raise ValueError(f"groups is {list(groups)}: every entry must be an int >= 0")
        num_groups = max(groups) + 1
    return device, num_groups


def _is_gradient(tensor: Tensor | None, device: torch.device) -> bool:
    return tensor is None or (
        isinstance(tensor, Tensor)
        and tensor.layout is torch.strided
        and tensor.is_floating_point()
        and tensor.device == device
        and has_memory(tensor)
    )


def _refuse(name: str, tensor: Any, device: torch.device) -> NoReturn:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None, not {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(
            f"{name} is sparse ({tensor.layout}): convert it (.to_dense()), or build the embedding "
            "with sparse=False"
        )
    if not tensor.is_floating_point():
        raise TypeError(f"{name} is {tensor.dtype}: a gradient must be a floating-point tensor")
    if not has_memory(tensor):
        raise TypeError(
            f"{name} is a {type(tensor).__name__}, which has no memory of its own: pass plain "
            "tensors (of a DTensor its part, .to_local(), and sum the stats over the ranks)"
        )
    raise ValueError(
        f"{name} is on {tensor.device} and the first gradient on {device}: all gradients must be "
        "on one device"
    )


def _is_expanded(tensor: Tensor) -> bool:
    if tensor.is_contiguous():
        return False
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return any(size > 1 and stride == 0 for size, stride in sizes)
