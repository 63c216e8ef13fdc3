"""The angle between two lists of gradients, and their gated combination, in one pass each.

    stats = (a . b, |a|^2, |b|^2)          angle = acos(a . b / (|a| |b|)) in degrees
    l'    = weight if angle <= max_angle else 0
    a    <- scale ((1 - l') a + l' b)

Source: arXiv 2602.03563, equations 2 and 4 (ACL-Grad).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import NO_TRITON
from .names import check_name

Gradients = Sequence[Tensor | None]

IMPLEMENTATIONS = ("auto", "reference", "tiled", "triton")

# Elements of a chunk for each thread: the first operation reads them from memory, the following
# ones from the core's cache. Measured on a Xeon with 2 MiB of L2 per core, one thread, float32:
# sums of 110M elements 32k 136 ms, 128k 128 ms, 256k 142 ms, 1024k 162 ms; combination of 53M
# elements 32k 58 ms, 128k 53 ms, 256k 57 ms, 1024k 62 ms.
CHUNK_PER_THREAD = 128 * 1024


def grad_dot_norm(
    a: Gradients, b: Gradients, *, groups: Sequence[int] | None = None, impl: str = "auto"
) -> Tensor:
    """(a . b, |a|^2, |b|^2) of two lists of gradients, per group.

    Args:
        a, b: equally long lists; entry i of both has the same shape. None stands for zeros.
        groups: the group 0..G-1 of every entry; None: one group.
        impl: "tiled" reads both lists once, in chunks that stay in cache (CPU only); "reference"
            makes three passes and never waits for the device; "auto" takes the one that fits.

    Returns:
        [G, 3] float32, accumulated in float64 over chunks of float32 sums (float64 gradients:
        of float64 sums). The same call gives the same bits.

    Raises:
        TypeError, ValueError: naming the entry and what would do.
    """
    device, num_groups = _check_lists(a, b, groups)
    pair_sums = {"reference": _pair_sums, "tiled": _pair_sums_by_chunks}[choose(impl, device)]
    rows: list[list[Tensor]] = [[] for _ in range(num_groups)]
    for index, (left, right) in enumerate(zip(a, b, strict=True)):
        if left is not None or right is not None:
            rows[0 if groups is None else groups[index]].append(pair_sums(left, right))
    nothing = torch.zeros(3, dtype=torch.float64, device=device)
    return torch.stack([torch.stack([nothing, *group]).sum(0) for group in rows]).float()


def gated_combine_(
    a: Gradients,
    b: Gradients,
    stats: Tensor,
    *,
    weight: float,
    max_angle: float = 90.0,
    scale: float | Tensor | None = None,
    groups: Sequence[int] | None = None,
    impl: str = "auto",
) -> Tensor:
    """a <- scale ((1 - l') a + l' b) in place, l' = weight where the angle is small enough.

    Args:
        a, b: as in `grad_dot_norm`; an entry of `a` may be None only where that of `b` is too.
        stats: [G, 3] of `grad_dot_norm` for the same lists and groups.
        weight: l' in [0, 1] where the two agree; elsewhere l' = 0.
        max_angle: the largest angle in degrees, in [0, 180], at which they agree. With a zero
            gradient on either side the angle is 90.
        scale: a factor for the result (loss-scale removal, clipping): a number or a 0-dim tensor.
        groups, impl: as in `grad_dot_norm`.

    Returns:
        [G] float32: the l' used. NaN where the stats are not finite: that group has no angle and
        its gradients are left as they are, so the caller has to skip the step.

    Raises:
        TypeError, ValueError: naming the argument and what would do.
    """
    device, num_groups = _check_lists(a, b, groups)
    if tuple(stats.shape) != (num_groups, 3):
        raise ValueError(
            f"stats has shape {tuple(stats.shape)}: {num_groups} group(s) need [{num_groups}, 3], "
            "as grad_dot_norm returns for the same lists and groups"
        )
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
    angle = _angle(stats)
    agree = (angle <= max_angle).to(angle.dtype)
    used = (agree * weight).masked_fill(angle.isnan(), torch.nan)
    combine_ = {"reference": _combine_, "tiled": _combine_by_chunks_}[choose(impl, device)]
    with torch.no_grad():
        factors = used.unbind()
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            if left is not None:
                combine_(left, right, factors[0 if groups is None else groups[index]], scale)
    return used.float()


def angle_degrees(stats: Tensor) -> Tensor:
    """Angle [G] in degrees, float32, from the [G, 3] of `grad_dot_norm`.

    90 where a gradient is zero, NaN where the stats are not finite. Waits for no device.
    """
    return _angle(stats).float()


def combined_squared_norm(stats: Tensor, used: Tensor) -> Tensor:
    """|(1 - l') a + l' b|^2 [G], float32, before any scale; without another pass.

    Args:
        stats: [G, 3] of `grad_dot_norm`.
        used: the l' [G] that `gated_combine_` returned (NaN stays NaN).
    """
    dot, a_squared, b_squared = stats.double().unbind(1)
    used = used.double()
    kept = 1 - used
    squared = kept.square() * a_squared + 2 * used * kept * dot + used.square() * b_squared
    return squared.clamp(min=0).float()


def _angle(stats: Tensor) -> Tensor:
    # In float64 acos(0) is 90 degrees to the last bit, so that a threshold of 90 keeps 90.
    dot, a_squared, b_squared = stats.double().unbind(1)
    product = a_squared.sqrt() * b_squared.sqrt()
    cosine = (dot / product).masked_fill(product == 0, 0).clamp(-1, 1)
    return torch.rad2deg(torch.acos(cosine)).masked_fill(~stats.isfinite().all(1), torch.nan)


def choose(impl: str, device: torch.device) -> str:
    """The implementation that runs, "reference" or "tiled"; ValueError if `impl` cannot."""
    check_name("impl", impl, IMPLEMENTATIONS)
    on_cpu = device.type == "cpu"
    if impl == "auto":
        return "tiled" if on_cpu else "reference"
    if impl == "triton":
        raise ValueError(f"impl='triton' cannot run: {NO_TRITON}")
    if impl == "tiled" and not on_cpu:
        raise ValueError(
            f"impl='tiled' cannot run: it is for the CPU, the gradients are on {device} "
            "(impl='reference' runs anywhere)"
        )
    return impl


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _chunk_size() -> int:
    return CHUNK_PER_THREAD * torch.get_num_threads()


def _flat(tensor: Tensor) -> Tensor:
    # `reshape` copies a gradient that is not contiguous; both lists are then in index order.
    return tensor.detach().reshape(-1)


def _pair_sums(left: Tensor | None, right: Tensor | None) -> Tensor:
    """(x . y, |x|^2, |y|^2) [3] float64 of one entry."""
    x, y = (None if t is None else _flat(t).to(_sum_dtype(t)) for t in (left, right))
    some = x if x is not None else y
    assert some is not None, "an entry that is None on both sides is left out"
    zero = some.new_zeros((), dtype=torch.float64)
    dot = zero
    if x is not None and y is not None:
        dtype = torch.promote_types(x.dtype, y.dtype)
        dot = torch.dot(x.to(dtype), y.to(dtype)).double()
    return torch.stack([dot, *(zero if t is None else torch.dot(t, t).double() for t in (x, y))])


def _pair_sums_by_chunks(left: Tensor | None, right: Tensor | None) -> Tensor:
    """`_pair_sums` in one pass over memory; `.item()` waits for nothing on the CPU."""
    chunk_size = _chunk_size()
    if left is None or right is None:
        some = left if left is not None else right
        assert some is not None, "an entry that is None on both sides is left out"
        chunks = (chunk.to(_sum_dtype(some)) for chunk in _flat(some).split(chunk_size))
        squared = sum(torch.dot(x, x).item() for x in chunks)
        sums = [0.0, squared, 0.0] if right is None else [0.0, 0.0, squared]
        return torch.tensor(sums, dtype=torch.float64)
    dtype = torch.promote_types(_sum_dtype(left), _sum_dtype(right))
    dot = left_squared = right_squared = 0.0
    for x, y in zip(_flat(left).split(chunk_size), _flat(right).split(chunk_size), strict=True):
        x, y = x.to(dtype), y.to(dtype)
        # In this order each product fetches one new operand from memory (1.05x the speed of
        # starting with the mixed one).
        left_squared += torch.dot(x, x).item()
        dot += torch.dot(x, y).item()
        right_squared += torch.dot(y, y).item()
    return torch.tensor([dot, left_squared, right_squared], dtype=torch.float64)


def _combine_(
    left: Tensor, right: Tensor | None, used: Tensor, scale: float | Tensor | None
) -> None:
    """One entry; `used` stays on the device, so a group without an angle is masked, not skipped."""
    dtype = _sum_dtype(left)
    a = left.to(dtype)
    weight = used.to(dtype)
    combined = a * (1 - weight) if right is None else torch.lerp(a, right.to(dtype), weight)
    if scale is not None:
        combined = combined * scale
    left.copy_(torch.where(weight.isnan(), a, combined))


def _combine_by_chunks_(
    left: Tensor, right: Tensor | None, used: Tensor, scale: float | Tensor | None
) -> None:
    """One entry, chunk by chunk while it is in cache."""
    weight, factor = used.item(), 1.0 if scale is None else float(scale)
    if weight != weight or (weight == 0 and factor == 1):
        return
    if not left.is_contiguous():
        _combine_(left, right, used, scale)
        return
    dtype = _sum_dtype(left)
    others = None if right is None or weight == 0 else _flat(right).split(_chunk_size())
    if others is None:
        factor *= 1 - weight
    for index, chunk in enumerate(left.view(-1).split(_chunk_size())):
        combined = chunk.to(dtype)
        if others is not None:
            combined.lerp_(others[index].to(dtype), weight)
        if factor != 1:
            combined *= factor
        if combined is not chunk:
            chunk.copy_(combined)


def _check_lists(
    a: Gradients, b: Gradients, groups: Sequence[int] | None
) -> tuple[torch.device, int]:
    """The device of the gradients (the CPU if all are None) and the number of groups."""
    if len(a) != len(b):
        raise ValueError(
            f"a has {len(a)} entries and b {len(b)}: they must be equally long, with None for a "
            "parameter that a loss does not reach"
        )
    if len(a) == 0:
        raise ValueError("a and b are empty: pass the gradients of at least one parameter")
    first: tuple[str, Tensor] | None = None
    for index, pair in enumerate(zip(a, b, strict=True)):
        for side, tensor in zip("ab", pair, strict=True):
            if tensor is None:
                continue
            name = f"{side}[{index}]"
            _check_gradient(name, tensor)
            if first is None:
                first = name, tensor
            if tensor.device != first[1].device:
                raise ValueError(
                    f"{name} is on {tensor.device} and {first[0]} on {first[1].device}: all "
                    "gradients must be on one device"
                )
        left, right = pair
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
        if any(isinstance(g, bool) or not isinstance(g, int) or g < 0 for g in groups):
            raise ValueError(f"groups is {list(groups)}: every entry must be an int >= 0")
        num_groups = max(groups) + 1
    return (torch.device("cpu") if first is None else first[1].device), num_groups


def _check_gradient(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None, not {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(
            f"{name} is sparse ({tensor.layout}): convert it (.to_dense()), or build the embedding "
            "with sparse=False"
        )
    if not tensor.is_floating_point():
        raise TypeError(f"{name} is {tensor.dtype}: a gradient must be a floating-point tensor")
