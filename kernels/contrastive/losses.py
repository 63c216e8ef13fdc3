"""The public contrastive losses: validation, choice of implementation, reduction."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from . import dispatch, reference
from .checks import check_options, check_shapes, check_tensors
from .sharded import batch
from .sharded import losses as sharded
from .sharded.agreement import (
    ProcessGroup,
    agree,
    announce_refusal,
    check_device,
    check_process_group,
)
from .tiled import loss as tiled


def supcon_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    temperature: float = 0.5,
    denominator: str = "all",
    reduction: str = "mean",
    ignore_index: int = -100,
    process_group: ProcessGroup | None = None,
    impl: str = "auto",
) -> Tensor:
    """Supervised contrastive loss of the samples of a batch (SCL).

    For rows x_i with labels y_i, z_i = x_i / ||x_i||, s_ij = z_i . z_j / temperature and the
    positives P_i = {j != i : y_j = y_i}:

        L_i = log D_i - (1 / |P_i|) sum_{j in P_i} s_ij

    Anchors without a positive do not count; a batch without any has loss 0 and gradient 0. A zero
    vector stays zero and gets gradient zero. NaN in an embedding makes loss and gradient NaN.

    Args:
        embeddings: [N, d], or [E, N, d] for E exits at once; float16, bfloat16, float32 or float64.
        labels: [N] integers of any value, shared by the exits.
        temperature: a Python number > 0.
        denominator: D_i = sum_k exp(s_ik) over "all" rows (arXiv 2602.03563 eq. 1), over the
            "others" (k != i; Khosla et al. 2020) or over the "negatives" (rows of other classes;
            Yeh et al. 2021; an anchor without a negative does not count either).
        reduction: "mean" over the anchors that count, "sum" (the paper), or "none": the L_i.
        ignore_index: a row with this label does not exist.
        process_group: over whose ranks the gradients are averaged, as data-parallel training does
            (`torch.distributed.group.WORLD`, say). The samples of all its ranks are then one batch,
            of W x N samples on W ranks; see below. None: this process's batch alone.
        impl: "auto" (the fastest here), "reference", "tiled" or "triton".

    Returns:
        A scalar ([E] with exits; [N] or [E, N] for "none"): float32, or float64 for float64
        embeddings. It is computed in that precision, under autocast too.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would do.

    With a process_group of W ranks:
        Every rank passes its own samples, as many as it has (none, too), the same label embeddings
        and the same options. The rows of all ranks are anchors, positives and negatives, label
        embeddings and their teacher counterparts once. Loss and gradients are those of one process
        that holds all samples, to rounding, once the gradients of the ranks are averaged: "mean"
        and "sum" return the loss of the global batch on every rank, embeddings get W times its
        gradient and label embeddings the whole of it. All ranks must scale the loss alike.

        "none" returns the L_i of the own rows: the own samples', and on every rank those of all
        label embeddings (teacher rows likewise). Averaging gives the gradient of the mean over
        ranks of what is made of them: W x own samples' sum + label embeddings' sum on every rank
        averages to the "sum" of the global batch.

        All ranks of the group must call, in the same order. What one rank passes and others do not
        raises on all of them. Three all-gathers make a loss, a short one to agree, the embeddings
        and one number a row; the last belongs to the backward pass for "none", where a rank that
        does not call backward leaves the others waiting until the group's timeout. For "mean" and
        "sum" the backward pass has no communication.
    """
    return _contrastive_loss(
        labels, {"embeddings": embeddings},
        temperature, denominator, reduction, ignore_index, process_group, impl,
    )  # fmt: skip


def acl_loss(
    embeddings: Tensor,
    labels: Tensor,
    label_embeddings: Tensor,
    *,
    temperature: float = 0.5,
    denominator: str = "all",
    reduction: str = "mean",
    ignore_index: int = -100,
    process_group: ProcessGroup | None = None,
    impl: str = "auto",
) -> Tensor:
    """Aligned contrastive loss: samples and label embeddings are rows alike (ACL-Embed).

    `supcon_loss` over M = N + K rows: the samples, then label embedding k with label k. Gradient
    goes to both. See `supcon_loss` for the formula and the arguments it shares.

    Args:
        embeddings: [N, d], or [E, N, d] for E exits at once.
        labels: [N] integers in [0, K), or `ignore_index`.
        label_embeddings: [K, d] (the weight of an `nn.Linear` classifier as it lies), or [E, K, d].
            The dtype is that of `embeddings`; under autocast the two may differ.

    Returns:
        A scalar, or [E]; for reduction "none" [N + K] or [E, N + K], samples first.

    Source: arXiv 2602.03563, section 3 (ACL-Embed).
    """
    tensors = {"embeddings": embeddings, "label_embeddings": label_embeddings}
    return _contrastive_loss(
        labels, tensors,
        temperature, denominator, reduction, ignore_index, process_group, impl,
    )  # fmt: skip


def acl_cl_loss(
    embeddings: Tensor,
    labels: Tensor,
    label_embeddings: Tensor,
    teacher_embeddings: Tensor,
    teacher_label_embeddings: Tensor,
    *,
    temperature: float = 0.5,
    denominator: str = "all",
    reduction: str = "mean",
    ignore_index: int = -100,
    process_group: ProcessGroup | None = None,
    impl: str = "auto",
) -> Tensor:
    """Cross-layer aligned contrastive loss: an exit's rows beside the last exit's (ACL-CL).

    `supcon_loss` over M = 2N + 2K rows: samples, label embeddings, teacher samples, teacher label
    embeddings. Teacher rows are anchors, positives and negatives like the others, but constants:
    no gradient goes to them. See `supcon_loss` for the formula and the arguments it shares.

    Args:
        embeddings: [N, d], or [E, N, d] for E exits at once.
        labels: [N] integers in [0, K), or `ignore_index`.
        label_embeddings: [K, d], or [E, K, d].
        teacher_embeddings: [N, d], of the same samples; shared by the exits.
        teacher_label_embeddings: [K, d]; shared by the exits.

    Returns:
        A scalar, or [E]; for reduction "none" [2N + 2K] or [E, 2N + 2K].

    Source: arXiv 2602.03563, section 3 (ACL-CL).
    """
    tensors = {
        "embeddings": embeddings,
        "label_embeddings": label_embeddings,
        "teacher_embeddings": teacher_embeddings,
        "teacher_label_embeddings": teacher_label_embeddings,
    }
    return _contrastive_loss(
        labels, tensors,
        temperature, denominator, reduction, ignore_index, process_group, impl,
    )  # fmt: skip


def _contrastive_loss(
    labels: Tensor,
    tensors: dict[str, Tensor],
    temperature: float,
    denominator: str,
    reduction: str,
    ignore_index: int,
    process_group: ProcessGroup | None,
    impl: str,
) -> Tensor:
    if process_group is not None and torch.compiler.is_compiling():
        raise ValueError(
            "process_group cannot be compiled: the ranks tell each other their sizes first (leave "
            "the loss out of what torch.compile compiles)"
        )
    # A group of one rank has nothing to gather.
    num_ranks = 1 if process_group is None else check_process_group(process_group)
    try:
        check_options(temperature, denominator, reduction, ignore_index, impl)
        check_tensors(tensors, labels)
        check_shapes(tensors, labels)
        if num_ranks > 1:
            check_device(process_group, tensors["embeddings"].device)
        name = dispatch.choose(impl, _workload(tensors, temperature, num_ranks))
    except Exception as error:
        if num_ranks > 1:
            announce_refusal(process_group, error)
        raise
    contrastive_loss = implementation(name)
    if num_ranks > 1:
        options = (temperature, denominator, reduction, ignore_index)
        spread = _agree(process_group, tensors, options, name)
        # Without any sample the rows are the same on every rank, and each computes the loss.
        if any(spread.num_samples):
            contrastive_loss = functools.partial(sharded.contrastive_loss, name, spread)
    embeddings = tensors["embeddings"]
    teachers = (tensors.get("teacher_embeddings"), tensors.get("teacher_label_embeddings"))
    arguments = (
        embeddings, labels, tensors.get("label_embeddings"),
        *(None if teacher is None else teacher.detach() for teacher in teachers),
        float(temperature), denominator, reduction, ignore_index,
    )  # fmt: skip
    device_type = embeddings.device.type
    if not torch.is_autocast_enabled(device_type):
        return contrastive_loss(*arguments)
    with torch.autocast(device_type, enabled=False):
        return contrastive_loss(*arguments)


def _workload(tensors: dict[str, Tensor], temperature: float, num_ranks: int) -> dispatch.Workload:
    embeddings = tensors["embeddings"]
    dtypes = [tensor.dtype for tensor in tensors.values()]
    return dispatch.Workload(
        device=embeddings.device,
        # Under autocast they may differ: a float64 weight asks for float64 arithmetic.
        dtype=torch.float64 if torch.float64 in dtypes else embeddings.dtype,
        temperature=temperature,
        num_rows=sum(tensor.shape[-2] for tensor in tensors.values()),
        width=embeddings.shape[-1],
        num_ranks=num_ranks,
    )


def _agree(
    process_group: ProcessGroup,
    tensors: dict[str, Tensor],
    options: tuple[float, str, str, int],
    name: str,
) -> batch.Spread:
    """Who has how many samples, after all ranks have said that they compute the same loss."""
    embeddings, label_embeddings = tensors["embeddings"], tensors.get("label_embeddings")
    num_labels = 0 if label_embeddings is None else label_embeddings.shape[-2]
    call = {
        "the number of exits E": embeddings.shape[0] if embeddings.dim() == 3 else None,
        "the width d": embeddings.shape[-1],
        "the number of label embeddings K": num_labels,
        "the dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
        "the device": embeddings.device.type,
        "temperature": options[0],
        "denominator": options[1],
        "reduction": options[2],
        "ignore_index": options[3],
        "the implementation chosen": name,
    }
    num_samples = agree(process_group, embeddings.shape[-2], call)
    return batch.Spread(
        process_group,
        torch.distributed.get_rank(process_group),
        num_samples,
        num_labels,
        num_copies=2 if "teacher_embeddings" in tensors else 1,
    )


def implementation(name: str) -> Callable[..., Tensor]:
    """The loss of one file. Triton's are imported when they are chosen: Triton may be absent."""
    if name == "reference":
        return reference.contrastive_loss
    if name == "tiled":
        return tiled.contrastive_loss
    if name == "supcon_small":
        from .gpu import small_batches

        return small_batches.contrastive_loss
    from .gpu import large_batches

    return large_batches.contrastive_loss
