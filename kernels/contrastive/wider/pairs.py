"""The logarithm of D_i = sum_k exp(scale_i z_i . z_k), and its gradient, tile by tile.

With e_ij = exp(scale_i z_i . z_j), 0 where the denominator leaves the pair out, and u_i = g_i / D_i
for upstream gradients g_i:

    dz_i     = sum_j (e_ij u_i scale_i + e_ji u_j scale_j) z_j
    dscale_i = u_i sum_j e_ij z_i . z_j

Where all rows have one scale, e is symmetric and a pair has one exponential. A tile serves the rows
of both its sides. Rows of a memory are no anchors: their u is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autograd import NO_SECOND_DERIVATIVE, refuse_second_derivative, without_autocast
from ..tiled import cpu_loop, cpu_triangle
from ..tiled.loss import MAX_EXPONENT, as_exits, block_pairs, shaped, tile_rows
from .members import Members

# Floats; a loss that waits for its backward pass keeps what it has borrowed from the others.
WORTH_BORROWING = 2**18


class Pairs(NamedTuple):
    """The pairs of the first A rows of z with all its rows, of which the first n are trained.

    z: unit rows [E, R, d], 0 for rows that do not exist. scale: [E] or [E, A].
    exists: [R], 1 or 0. keys: classes [R] or memberships [R, K], for "negatives".
    fused_temperature: that of all rows, for the kernels of `fused_pairs`, whose D is smaller by
        exp(1 / temperature); None for tiles. z may then be float16.
    """

    z: Tensor
    scale: Tensor
    exists: Tensor
    keys: Tensor
    denominator: str
    num_anchors: int
    num_trained: int
    pair_memory: int
    fused_temperature: float | None

    @property
    def by_row(self) -> bool:
        return self.scale.dim() == 2


def log_denominators(
    z: Tensor,
    rows: Tensor,
    scale: Tensor,
    members: Members,
    denominator: str,
    num_anchors: int,
    pair_memory: int,
    fused_temperature: float | None,
    compute: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Return log D [.., A], -inf for an anchor without a pair, as a function of z and the scale.

    z: [.., n, d], the trained rows. rows: [.., R, d], z and constants. scale: [..] or [.., A].
    compute: a function of z and the fields of `Pairs` that returns log D [E, A]; for several
    processes, which share the work.
    """
    keys = members.labels
    if keys.dim() == 2:
        # Not the memberships, whose products may be too small for float32.
        keys = (keys != 0).to(z.dtype)
    exists = members.exists.to(z.dtype)
    num_exits = as_exits(z).shape[0]
    if scale.dim() == z.dim() - 1:
        scales = scale.expand(*z.shape[:-2], num_anchors).reshape(num_exits, num_anchors)
    else:
        scales = scale.expand(num_exits)
    arguments = (
        as_exits(z), as_exits(rows), scales, exists, keys, denominator, num_anchors, z.shape[-2],
        pair_memory, fused_temperature,
    )  # fmt: skip
    if compute is not None:
        result = compute(*arguments)
    elif torch.compiler.is_compiling():
        result = denominators_operator(*arguments)[0]
    else:
        result = LogDenominators.apply(*arguments)
    return result.view(*z.shape[:-2], num_anchors)


def tiled_sums(pairs: Pairs, with_products: bool) -> list[Tensor]:
    """Return D [E, A] and, if they are wanted, the sums of e_ij z_i . z_j [E, A]."""
    shape = pairs.z.shape[0], pairs.num_anchors
    found = [pairs.z.new_zeros(shape) for _ in range(1 + with_products)]
    buffers = tiles_for(pairs)
    for exit, z in enumerate(pairs.z):
        for i, j in block_pairs(pairs.num_anchors, z.shape[0], tile_rows(z)):
            products, tile, weighted = (shaped(buffer, i, j) for buffer in buffers)
            torch.matmul(z[i], z[j].t(), out=products)
            exponentials(pairs, exit, products, i, j, False, tile)
            of_rows = [part[exit, i] for part in found]
            add_sums(of_rows, tile, products, pairs.exists[j], weighted)
            if i != j and j.stop <= pairs.num_anchors:
                if pairs.by_row:
                    exponentials(pairs, exit, products, i, j, True, tile)
                of_columns = [part[exit, j] for part in found]
                add_sums(of_columns, tile.t(), products.t(), pairs.exists[i], weighted.t())
    return found


def add_sums(sums: list[Tensor], e: Tensor, products: Tensor, exists: Tensor, out: Tensor) -> None:
    """Add the sums over columns of e and, if `sums` has two, of e times products."""
    sums[0].addmv_(e, exists)
    if len(sums) > 1:
        sums[1].addmv_(torch.mul(e, products, out=out), exists)


def tiled_gradient(pairs: Pairs, u: Tensor) -> Tensor:
    """Return dz [E, n, d] of the trained rows, for u_i scale_i [E, R]."""
    num_exits, num_rows, width = pairs.z.shape
    num_trained = pairs.num_trained
    result = pairs.z.new_zeros(num_exits, num_trained, width)
    buffers = tiles_for(pairs)
    for exit, z in enumerate(pairs.z):
        for i, j in block_pairs(num_trained, num_rows, tile_rows(z)):
            products, tile, other = (shaped(buffer, i, j) for buffer in buffers)
            torch.matmul(z[i], z[j].t(), out=products)
            exponentials(pairs, exit, products, i, j, False, tile)
            if i == j:
                # A multiple of z_i, which the normalization removes, but not its rounding.
                tile.fill_diagonal_(0)
                products.fill_diagonal_(-torch.inf)
            if pairs.by_row:
                tile *= u[exit, i, None]
                if j.start < pairs.num_anchors:
                    exponentials(pairs, exit, products, i, j, True, other)
                    tile.addcmul_(other, u[exit, j].expand_as(other))
            else:
                tile *= torch.add(u[exit, i, None], u[exit, j], out=other)
            result[exit, i].addmm_(tile, z[j])
            if i != j and j.stop <= num_trained:
                result[exit, j].addmm_(tile.t(), z[i])
    return result


def exponentials(
    pairs: Pairs, exit: int, products: Tensor, i: slice, j: slice, is_column: bool, out: Tensor
) -> None:
    """Write e_ij of a tile or, with is_column, e_ji; 0 where D leaves the pair out."""
    scale = pairs.scale[exit]
    if pairs.by_row:
        scale = anchor_scale(scale, j) if is_column else scale[i, None]
    torch.mul(products, scale, out=out).exp_()
    if pairs.denominator == "others" and i == j:
        out.fill_diagonal_(0)
    elif pairs.denominator == "negatives":
        rows, columns = pairs.keys[i], pairs.keys[j]
        apart = rows[:, None] != columns if rows.dim() == 1 else (rows @ columns.t()) == 0
        out *= apart


def anchor_scale(scale: Tensor, block: slice) -> Tensor:
    """Return the scales of a block of rows, 0 for those that are no anchors."""
    found = scale[block]
    return torch.nn.functional.pad(found, (0, block.stop - block.start - found.shape[0]))


def tiles_for(pairs: Pairs) -> Tensor:
    return pairs.z.new_empty(3, tile_rows(pairs.z) ** 2)


def compiled_loop_takes(pairs: Pairs) -> bool:
    """Return whether cpu_triangle.c computes these pairs."""
    if pairs.fused_temperature is not None:
        return False
    has_keys = pairs.denominator != "negatives" or pairs.keys.dim() == 1
    return has_keys and cpu_triangle.can_run(pairs.z)


def compiled_sums(pairs: Pairs, with_products: bool, tiles: Tensor) -> list[Tensor]:
    """Return what `tiled_sums` returns. tiles: memory for exponentials, by exit."""
    shape = pairs.z.shape[0], pairs.num_anchors
    found = [pairs.z.new_empty(shape) for _ in range(1 + with_products)]
    for exit in range(shape[0]):
        outputs = dict(zip(("result", "products"), (part[exit] for part in found), strict=False))
        run_exit(
            pairs, exit, tiles[exit], outputs,
            num_own=pairs.num_anchors, num_kept_rows=pairs.num_trained if tiles.numel() else 0,
        )  # fmt: skip
    # The loop replaces a sum of 0 by the smallest number.
    found[0].masked_fill_(found[0] <= torch.finfo(torch.float32).tiny, 0)
    if with_products:
        found[1] *= cpu_triangle.LN2 if pairs.by_row else cpu_triangle.LN2 / pairs.scale[:, None]
    return found


def compiled_gradient(pairs: Pairs, u: Tensor, tiles: Tensor, are_kept: bool) -> Tensor:
    """Return what `tiled_gradient` returns. are_kept: whether tiles hold exponentials."""
    num_exits, _, width = pairs.z.shape
    result = pairs.z.new_empty(num_exits, pairs.num_trained, width)
    for exit in range(num_exits):
        outputs = {"u": u[exit], "result": result[exit]}
        run_exit(
            pairs, exit, tiles[exit], outputs,
            num_own=pairs.num_trained, are_kept=are_kept,
        )  # fmt: skip
    return result


def run_exit(
    pairs: Pairs, exit: int, tiles: Tensor, outputs: dict[str, Tensor], **options: Any
) -> None:
    temperature, scales = 1.0, None
    if pairs.by_row:
        scales = anchor_scale(pairs.scale[exit], slice(0, pairs.z.shape[1]))
    else:
        temperature = 1 / float(pairs.scale[exit])
    classes = pairs.keys if pairs.keys.dim() == 1 else pairs.exists
    parts = {
        "y": pairs.z[exit], "classes": classes.int(), "exists": pairs.exists, "scales": scales,
        **outputs,
    }  # fmt: skip
    cpu_triangle.run_pairs(parts, tiles, pairs.denominator, temperature=temperature, **options)


def memory_for_tiles(pairs: Pairs) -> Tensor:
    """Borrow memory for tiles of the gradient, [E, floats]; to be given back."""
    num_exits, num_rows, _ = pairs.z.shape
    share = pairs.pair_memory // max(num_exits, 1)
    each = max(cpu_triangle.num_tiles(num_rows, pairs.num_trained, share), 1)
    size = num_exits * each * cpu_triangle.TILE_ELEMENTS
    if size <= WORTH_BORROWING:
        return cpu_loop.floats(size)
    return cpu_triangle.borrow(num_exits * each)


def by_exit(memory: Tensor, num_exits: int) -> Tensor:
    """Return memory as [E, floats], whole tiles each."""
    tiles = memory.numel() // (max(num_exits, 1) * cpu_triangle.TILE_ELEMENTS)
    each = tiles * cpu_triangle.TILE_ELEMENTS
    return memory[: num_exits * each].view(num_exits, each)


def denominators(
    pairs: Pairs, trains_z: bool, trains_scale: bool, is_whole: bool = True
) -> tuple[list[Tensor], Tensor | None]:
    """Return D [E, A], sums of products to train the scale, and tiles kept to train z, or None.

    is_whole: whether the pairs are all there are, so that sums which follow from dz are left out.
    """
    if pairs.fused_temperature is not None:
        from . import fused_pairs

        z, _, exists, keys, denominator, num_anchors, *_ = pairs
        return [
            fused_pairs.sums(z, exists, keys, pairs.fused_temperature, denominator, num_anchors)
        ], None
    if not compiled_loop_takes(pairs):
        return tiled_sums(pairs, trains_scale), None
    trains_scale = trains_scale and not (is_whole and trains_z and follows_from_z(pairs))
    memory = memory_for_tiles(pairs) if trains_z and not pairs.by_row else None
    tiles = by_exit(pairs.z.new_empty(0) if memory is None else memory, len(pairs.z))
    return compiled_sums(pairs, trains_scale, tiles), memory


class LogDenominators(torch.autograd.Function):
    """log D [E, A] as a function of z and the scale; options: see `Pairs`."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, rows: Tensor, scale: Tensor, *arguments: Any) -> Tensor:
        pairs = Pairs(rows, scale, *arguments)
        trains_z, _, trains_scale, *_ = ctx.needs_input_grad
        found, ctx.memory = denominators(pairs, trains_z, trains_scale)
        ctx.save_for_backward(*pairs[:4], *found)
        ctx.options = pairs[4:]
        return logarithms(pairs, found[0])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative(NO_SECOND_DERIVATIVE.format("this loss"))
        pairs = Pairs(*ctx.saved_tensors[:4], *ctx.options)
        found = ctx.saved_tensors[4:]
        of_z = of_scale = None
        with without_autocast(pairs.z.device.type):
            if ctx.needs_input_grad[0]:
                memory, ctx.memory = ctx.memory, None
                of_z = gradient(pairs, upstream, found[0], memory)
            if ctx.needs_input_grad[2] and len(found) > 1:
                of_scale = scale_gradient(pairs, upstream, *found)
            elif ctx.needs_input_grad[2]:
                assert of_z is not None, "denominators() has checked"
                both = pairs.z.flatten(1)[:, None] @ of_z.flatten(1)[:, :, None]
                of_scale = both[:, 0, 0] / (2 * pairs.scale)
        return of_z, None, of_scale, *(None,) * (2 + len(ctx.options))


def follows_from_z(pairs: Pairs) -> bool:
    """Return whether dscale follows from dz of the compiled loop, which has the diagonal too.

    Where all rows are anchors and trained, sum_i z_i . dz_i = 2 scale dscale, since each pair's
    product occurs once with u_i and once with u_j.
    """
    all_rows = pairs.z.shape[1]
    return not pairs.by_row and pairs.num_anchors == pairs.num_trained == all_rows


def logarithms(pairs: Pairs, sums: Tensor) -> Tensor:
    """Return log D [E, A]."""
    if pairs.fused_temperature is None:
        return sums.log()
    return sums.log() + 1 / pairs.fused_temperature


def gradient(pairs: Pairs, upstream: Tensor, sums: Tensor, memory: Tensor | None) -> Tensor:
    """Return dz [E, n, d] for gradients of log D [E, A]; memory: tiles of exponentials, or None."""
    if pairs.fused_temperature is not None:
        return fused_gradient(pairs, upstream, sums)
    u = weights_of(upstream, sums) * (pairs.scale if pairs.by_row else pairs.scale[:, None])
    u = of_all_rows(pairs, u)
    if not compiled_loop_takes(pairs):
        return tiled_gradient(pairs, u)
    tiles = memory_for_tiles(pairs) if memory is None else memory
    result = compiled_gradient(pairs, u, by_exit(tiles, len(u)), memory is not None)
    cpu_triangle.give_back(tiles)
    return result


def fused_gradient(pairs: Pairs, upstream: Tensor, sums: Tensor) -> Tensor:
    from . import fused_pairs

    temperature = pairs.fused_temperature
    assert temperature is not None, "the caller has checked"
    # The kernels need weights of at most 1.
    largest = upstream.abs().amax(-1, keepdim=True)
    largest = largest.clamp(min=torch.finfo(torch.float32).tiny)
    u = of_all_rows(pairs, weights_of(upstream / largest, sums))
    result = fused_pairs.gradient(
        pairs.z, u, pairs.exists, pairs.keys, temperature, pairs.denominator, pairs.num_trained
    )
    return result * (largest / temperature)[..., None]


def of_all_rows(pairs: Pairs, u: Tensor) -> Tensor:
    """Return u [E, R], 0 for rows that are no anchors."""
    return torch.nn.functional.pad(u, (0, pairs.z.shape[1] - pairs.num_anchors))


def scale_gradient(pairs: Pairs, upstream: Tensor, sums: Tensor, products: Tensor) -> Tensor:
    result = weights_of(upstream, sums) * products
    return result if pairs.by_row else result.sum(-1)


def weights_of(upstream: Tensor, sums: Tensor) -> Tensor:
    """Return u = g / D, 0 where g is 0, also for D = 0."""
    return torch.where(upstream == 0, 0, upstream / sums)


# torch.compile sees operators. Unlike the Function they keep no tiles, whose memory is borrowed.
PAIRS_SCHEMA = (
    "Tensor rows, Tensor scale, Tensor exists, Tensor keys, str denominator, SymInt num_anchors, "
    "SymInt num_trained, SymInt pair_memory, float? fused_temperature"
)


@torch.library.custom_op(
    "fusedacl::denominators", mutates_args=(), schema=f"(Tensor z, {PAIRS_SCHEMA}) -> Tensor[]"
)
def denominators_operator(z: Tensor, *arguments: Any) -> list[Tensor]:
    """Return log D, D and, for tiles, the sums of products [E, A]."""
    pairs = Pairs(*arguments)
    check_scale(pairs)
    found, _ = denominators(pairs, False, pairs.fused_temperature is None)
    return [logarithms(pairs, found[0]), *found]


def check_scale(pairs: Pairs) -> None:
    """Raise ValueError, on the CPU, for temperatures that were not known when a graph was made."""
    if pairs.fused_temperature is not None or pairs.z.device.type != "cpu":
        return
    largest = MAX_EXPONENT[pairs.z.dtype]
    if not bool(((pairs.scale > 0) & (pairs.scale <= largest)).all()):
        raise ValueError(
            f"temperature has a value outside [1 / {largest:g}, inf), and a compiled graph "
            f"computes in {pairs.z.dtype}, where smaller ones overflow: raise it, or leave the "
            "loss out of torch.compile"
        )


@denominators_operator.register_fake
def _(z: Tensor, *arguments: Any) -> list[Tensor]:
    pairs = Pairs(*arguments)
    number = 3 if pairs.fused_temperature is None else 2
    return [z.new_empty(z.shape[0], pairs.num_anchors) for _ in range(number)]


@torch.library.custom_op(
    "fusedacl::denominators_backward",
    mutates_args=(),
    schema=f"(Tensor upstream, Tensor sums, {PAIRS_SCHEMA}) -> Tensor",
)
def denominators_gradient(upstream: Tensor, sums: Tensor, *arguments: Any) -> Tensor:
    """Return dz [E, n, d] for gradients of log D [E, A]."""
    return gradient(Pairs(*arguments), upstream, sums, None)


@denominators_gradient.register_fake
def _(upstream: Tensor, sums: Tensor, *arguments: Any) -> Tensor:
    pairs = Pairs(*arguments)
    return sums.new_empty(pairs.z.shape[0], pairs.num_trained, pairs.z.shape[2])


def save_arguments(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(*inputs[1:5], *output[1:])
    ctx.options = inputs[5:]


def operator_gradients(ctx: Any, upstream: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    tensors, found = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
    if upstream[0] is None:
        return (None,) * 10
    of_scale = None
    of_z = denominators_gradient(upstream[0], found[0], *tensors, *ctx.options)
    if len(found) > 1:
        of_scale = scale_gradient(Pairs(*tensors, *ctx.options), upstream[0], *found)
    return of_z, None, of_scale, *(None,) * 7


denominators_operator.register_autograd(operator_gradients, setup_context=save_arguments)
