"""The contrastive losses of large batches on the matrix unit; only O(M d) leaves the chip.

With unit rows z_i and e_ij = exp((z_i . z_j - 1) / temperature), 0 where the denominator leaves the
pair out:

    D_i = sum_j e_ij                                       the only sum over pairs
    L_i = log D_i + (1 - z_i . (C_i - z_i) / n_i) / temperature     C_i = sum of z_j over i's class

Gradient for upstream row weights w_i, with u_i = w_i / D_i and v_i = w_i / n_i:

    G_i  = sum_j e_ij (u_i + u_j) z_j - v_i (C_i - z_i) - (A_i - v_i z_i)
    A_i  = sum of v_j z_j over i's class                   v_i C_i where a class has one weight
    dx_i = (G_i - z_i (z_i . G_i)) / (temperature ||x_i||)

The sums over pairs are those of `pair_kernels`; the rest is done row by row, in `row_kernels`. The
pairs see row weights of at most 1: the largest upstream gradient and 1 / temperature come after, in
float32.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...support import machine
from ...support.variant import Variant
from ..autograd import without_autocast
from ..batch import compute_classes, parts_in_order
from .pair_sums import padded, padded_width, pair_gradient, pair_variants, row_sums
from .row_steps import class_sums, finish_gradients, losses, normalize, row_variants, unit_dtype
from .tiles import Blocks, shipped, tuned

MAX_WIDTH = 1024
# The smallest exponential, exp(-2 / temperature), stays a normal float32 down to here.
MIN_TEMPERATURE = 0.023


def contrastive_loss(
    embeddings: Tensor,
    labels: Tensor,
    label_embeddings: Tensor | None,
    teacher_embeddings: Tensor | None,
    teacher_label_embeddings: Tensor | None,
    temperature: float,
    denominator: str,
    reduction: str,
    ignore_index: int,
) -> Tensor:
    """The loss as in `reference.contrastive_loss`."""
    trained = (embeddings, label_embeddings)
    with_gradient = torch.is_grad_enabled() and any(
        part is not None and part.requires_grad for part in trained
    )
    arguments = (
        embeddings, labels, label_embeddings, teacher_embeddings, teacher_label_embeddings,
        temperature, denominator, reduction, ignore_index, with_gradient,
    )  # fmt: skip
    # Both do the same; outside torch.compile an operator would only add its dispatch.
    if torch.compiler.is_compiling():
        return supcon_fused(*arguments)[0]
    return FusedLoss.apply(*arguments)


def obstacle(
    num_rows: int, width: int, dtype: torch.dtype, temperature: float, capability: int
) -> str | None:
    """What keeps these kernels from computing this, or None."""
    if capability < 80:
        return (
            f"compute capability {capability / 10} has no matrix unit that Triton reaches: 8.0 or "
            "newer is needed for a large batch (impl='tiled' uses cuBLAS there)"
        )
    if dtype == torch.float64:
        return "float64 embeddings need impl='tiled' or 'reference': these kernels have none"
    if width > MAX_WIDTH:
        return f"width {width} is above {MAX_WIDTH} (impl='tiled' takes any width)"
    if temperature < MIN_TEMPERATURE:
        return (
            f"temperature {temperature} is below {MIN_TEMPERATURE}, where exponentials leave "
            "float32's range (impl='tiled' computes in float64 there)"
        )
    return None


class Rows(NamedTuple):
    """What is known of M rows before any pair is looked at; shapes as in `row_kernels`."""

    z: Tensor
    inverse_norms: Tensor
    shifts: Tensor
    padded_classes: Tensor
    sums_by_class: Tensor
    # int64 [M]: the rows by class; and [C + 1]: where a class begins in it.
    order: Tensor
    starts: Tensor


def prepare(
    embeddings: Tensor,
    labels: Tensor,
    label_embeddings: Tensor | None,
    teacher_embeddings: Tensor | None,
    teacher_label_embeddings: Tensor | None,
    temperature: float,
    ignore_index: int,
) -> Rows:
    """Unit vectors, classes and their sums: all that is O(M d), on the current device."""
    num_samples = labels.shape[0]
    num_labels = None if label_embeddings is None else label_embeddings.shape[-2]
    num_classes = num_samples if num_labels is None else num_labels
    num_copies = 1 if teacher_embeddings is None else 2
    classes, _ = compute_classes(labels, num_labels, ignore_index, num_copies)  # [M]
    # On a GPU, where a look at the labels would wait for the device, a label outside [0, K) stops
    # at this operation's bounds instead of in a kernel below.
    ids = torch.arange(num_classes + 1, device=classes.device)
    classes = ids.index_select(0, classes)

    unit_rows = normalize(
        embeddings, label_embeddings, teacher_embeddings, teacher_label_embeddings,
        classes, num_classes, temperature,
    )  # fmt: skip
    # Stable: the order of a class's rows decides the rounding of its sum.
    in_order, order = classes.sort(stable=True)
    starts = torch.searchsorted(in_order, ids)
    return Rows(*unit_rows, class_sums(unit_rows[0], None, order, starts), order, starts)


def forward(
    embeddings: Tensor,
    labels: Tensor,
    label_embeddings: Tensor | None,
    teacher_embeddings: Tensor | None,
    teacher_label_embeddings: Tensor | None,
    temperature: float,
    denominator: str,
    reduction: str,
    ignore_index: int,
    with_gradient: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and what `backward` needs to know of this pass: O(M d)."""
    with torch.cuda.device_of(embeddings):
        rows = prepare(
            embeddings, labels, label_embeddings, teacher_embeddings, teacher_label_embeddings,
            temperature, ignore_index,
        )  # fmt: skip
        z, inverse_norms, shifts, padded_classes, sums_by_class, order, starts = rows
        num_rows = order.shape[0]
        partial_sums = row_sums(
            z, z, shifts, padded_classes, padded_classes, num_rows, num_rows, 0,
            temperature, denominator, tiles(z).forward,
        )  # fmt: skip
        loss, u, inverse_positives = losses(
            partial_sums, z, padded_classes, sums_by_class, starts, temperature, denominator
        )

    saved = [
        z, inverse_norms, shifts, padded_classes, u, inverse_positives, sums_by_class, order,
        starts,
    ]  # fmt: skip
    if reduction != "none":
        loss = loss.sum(-1)
    if reduction == "mean":
        num_anchors = torch.count_nonzero(inverse_positives).clamp_(min=1)
        loss /= num_anchors
        saved.append(num_anchors)
    return loss.view(embeddings.shape[:-2] + loss.shape[1:]), saved if with_gradient else []


@without_autocast
def backward(
    loss_gradient: Tensor,
    saved: list[Tensor],
    num_samples: int,
    num_labels: int | None,
    width: int,
    num_rows: int,
    temperature: float,
    denominator: str,
    reduction: str,
    sample_dtype: torch.dtype,
    label_dtype: torch.dtype | None,
) -> list[Tensor]:
    """Gradients [E, N, d] and, unless label_dtype is None, [E, K, d]."""
    (
        z, inverse_norms, shifts, padded_classes, u, inverse_positives, sums_by_class, order,
        starts, *num_anchors,
    ) = saved  # fmt: skip
    num_exits, num_padded_rows, _ = z.shape
    v, weighted_sums = inverse_positives, sums_by_class
    with torch.cuda.device_of(z):
        if reduction == "none":
            upstream = torch.nn.functional.pad(
                loss_gradient.reshape(num_exits, num_rows).float(), (0, num_padded_rows - num_rows)
            ).masked_fill_(inverse_positives == 0, 0)
            # The pairs' weights want row weights of at most 1.
            largest = upstream.abs().amax(-1, keepdim=True)
            largest.clamp_(min=torch.finfo(torch.float32).tiny)
            upstream /= largest
            u = u * upstream
            v = inverse_positives * upstream
            weighted_sums = class_sums(z, v, order, starts)
            factors = largest
        else:
            factors = loss_gradient.reshape(num_exits).float()
            if num_anchors:
                factors = factors / num_anchors[0]
            factors = factors.contiguous()

        num_trained = num_samples
        if label_dtype is not None and num_labels is not None:
            num_trained += num_labels
        partial_gradients = pair_gradient(
            z, z, u, u, shifts, padded_classes, padded_classes, num_trained, num_rows, 0,
            temperature, denominator, tiles(z).backward,
        )  # fmt: skip
        return finish_gradients(
            partial_gradients, z, inverse_norms, padded_classes, sums_by_class, weighted_sums,
            v, factors, num_samples, width, temperature, sample_dtype, label_dtype,
        )  # fmt: skip


def tiles(z: Tensor) -> Blocks:
    """The tiles for these unit rows where they are: measured ones, or those shipped."""
    capability = machine.capability(z.device)
    assert capability is not None, "dispatch.choose refuses such a device"
    kind = (z.device, z.dtype, z.shape[-1])
    blocks = shipped(capability, *kind[1:])
    return Blocks(
        tuned("row_sums", *kind) or blocks.forward, tuned("pair_gradient", *kind) or blocks.backward
    )


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    embeddings, labels, label_embeddings, teacher, _, temperature, denominator, reduction, _, _ = (
        inputs
    )
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1])
    num_samples, num_labels = labels.shape[0], None
    if label_embeddings is not None:
        num_labels = label_embeddings.shape[-2]
    num_rows = (1 if teacher is None else 2) * (num_samples + (num_labels or 0))
    ctx.options = (
        num_samples, num_labels, embeddings.shape[-1], num_rows,
        temperature, denominator, reduction,
    )  # fmt: skip
    ctx.leading = embeddings.shape[:-2]
    ctx.dtypes = (
        embeddings.dtype, None if label_embeddings is None else label_embeddings.dtype,
    )  # fmt: skip


def input_gradients(
    function: Callable[..., list[Tensor]], ctx: Any, loss_gradient: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradient of every input, by `backward` or its operator."""
    nothing = (None,) * 10
    if loss_gradient is None:
        return nothing
    sample_dtype, label_dtype = ctx.dtypes
    # Frozen label embeddings are constants like the teacher's: the pairs' rows stop before them.
    if not ctx.needs_input_grad[2]:
        label_dtype = None
    gradients = [
        gradient.view(ctx.leading + gradient.shape[1:])
        for gradient in function(
            loss_gradient, list(ctx.saved_tensors), *ctx.options, sample_dtype, label_dtype
        )
    ]
    label_gradient = None if label_dtype is None else gradients[1]
    return gradients[0], None, label_gradient, *nothing[3:]


class FusedLoss(torch.autograd.Function):
    """`supcon_fused` without an operator's dispatch."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = forward(*inputs)
        setup_context(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # Gradients of this gradient would leave the tiles out without a word.
            raise RuntimeError(
                "impl='triton' has no second derivative, and backward was called with "
                "create_graph=True: impl='reference' can be differentiated twice"
            )
        return input_gradients(backward, ctx, loss_gradient)


# The schemas are spelt out because torch 2.6 does not derive them from `list[Tensor]`.
supcon_fused = torch.library.custom_op(
    "fusedacl::supcon_fused",
    without_autocast(forward),
    mutates_args=(),
    schema=(
        "(Tensor embeddings, Tensor labels, Tensor? label_embeddings, Tensor? teacher_embeddings, "
        "Tensor? teacher_label_embeddings, float temperature, str denominator, str reduction, "
        "SymInt ignore_index, bool with_gradient) -> (Tensor, Tensor[])"
    ),
)
supcon_fused_backward = torch.library.custom_op(
    "fusedacl::supcon_fused_backward",
    backward,
    mutates_args=(),
    schema=(
        "(Tensor loss_gradient, Tensor[] saved, SymInt num_samples, SymInt? num_labels, "
        "SymInt width, SymInt num_rows, float temperature, str denominator, str reduction, "
        "ScalarType sample_dtype, ScalarType? label_dtype) -> Tensor[]"
    ),
)
supcon_fused.register_autograd(
    lambda ctx, loss_gradient, _: input_gradients(supcon_fused_backward, ctx, loss_gradient),
    setup_context=setup_context,
)


@supcon_fused.register_fake
def _(
    embeddings: Tensor,
    labels: Tensor,
    label_embeddings: Tensor | None,
    teacher_embeddings: Tensor | None,
    teacher_label_embeddings: Tensor | None,
    temperature: float,
    denominator: str,
    reduction: str,
    ignore_index: int,
    with_gradient: bool,
) -> tuple[Tensor, list[Tensor]]:
    parts = parts_in_order(
        embeddings, label_embeddings, teacher_embeddings, teacher_label_embeddings
    )
    num_rows = sum(part.shape[-2] for part in parts)
    leading = embeddings.shape[:-2]
    num_exits = leading.numel()
    loss = embeddings.new_empty(
        (*leading, num_rows) if reduction == "none" else leading, dtype=torch.float32
    )
    if not with_gradient:
        return loss, []
    num_classes = labels.shape[0] if label_embeddings is None else label_embeddings.shape[-2]
    num_padded_rows, width = padded(num_rows), padded_width(embeddings.shape[-1])
    saved = [
        loss.new_empty(num_exits, num_padded_rows, width, dtype=unit_dtype(embeddings.dtype)),
        loss.new_empty(num_exits, num_padded_rows),
        loss.new_empty(num_padded_rows),
        loss.new_empty(num_padded_rows, dtype=torch.int32),
        loss.new_empty(num_exits, num_padded_rows),
        loss.new_empty(num_padded_rows),
        loss.new_empty(num_classes + 1, num_exits, width),
        labels.new_empty(num_rows, dtype=torch.int64),
        labels.new_empty(num_classes + 1, dtype=torch.int64),
    ]
    if reduction == "mean":
        saved.append(labels.new_empty((), dtype=torch.int64))
    return loss, saved


@supcon_fused_backward.register_fake
def _(
    loss_gradient: Tensor,
    saved: list[Tensor],
    num_samples: int,
    num_labels: int | None,
    width: int,
    num_rows: int,
    temperature: float,
    denominator: str,
    reduction: str,
    sample_dtype: torch.dtype,
    label_dtype: torch.dtype | None,
) -> list[Tensor]:
    num_exits = saved[0].shape[0]
    gradients = [saved[0].new_empty(num_exits, num_samples, width, dtype=sample_dtype)]
    if label_dtype is not None:
        gradients.append(saved[0].new_empty(num_exits, num_labels or 0, width, dtype=label_dtype))
    return gradients


def variants(capability: int) -> list[Variant]:
    """Every padded width up to 256 and one above, whose code is that of all of them."""
    if capability < 80:
        return []
    found = []
    for dtype, width in itertools.product((torch.float16, torch.float32), (32, 64, 128, 256, 768)):
        found += pair_variants(capability, dtype, width)
        found += row_variants(dtype, width)
    return found
