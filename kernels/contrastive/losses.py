"""The public contrastive losses."""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch
from .autograd import without_autocast
from .batch import PAIR_MEMORY, Batch, WiderBatch
from .checks import (
    check_integers,
    check_number,
    check_options,
    check_shapes,
    check_temperature_values,
    check_tensors,
    check_wider,
)
from .options import (
    Options,
    describe,
    describe_temperatures,
    make_wider,
    needs_wider,
    smallest_temperature,
)
from .sharded import losses as sharded
from .sharded import wider as sharded_wider
from .sharded.agreement import (
    ProcessGroup,
    agree,
    announce_refusal,
    check_device,
    check_process_group,
)
from .sharded.batch import Spread


def supcon_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    denominator: str = "all",
    reduction: str = "mean",
    ignore_index: int = -100,
    process_group: ProcessGroup | None = None,
    impl: str = "auto",
    pair_memory: int = PAIR_MEMORY,
    positives: str = "overlap",
    ignore_mask: Tensor | None = None,
    class_weights: Tensor | None = None,
    memory_embeddings: Tensor | None = None,
    memory_labels: Tensor | None = None,
) -> Tensor:
    """Supervised contrastive loss of the samples of a batch (SCL).

    For rows x_i with labels y_i, z_i = x_i / ||x_i||, s_ij = z_i . z_j / temperature and the
    positives P_i = {j != i : y_j = y_i}:

        L_i = log D_i - (1 / |P_i|) sum_{j in P_i} s_ij

    Anchors without a positive do not count; a batch without any has loss 0 and gradient 0. A zero
    vector stays zero and gets gradient zero. NaN in an embedding makes loss and gradient NaN.

    With several or soft labels per row, whose entries are called memberships, in place of the mean
    over P_i, where y_i is the row's vector [K] of them:

        (1 / W_i) sum_{j != i} p_ij s_ij      W_i = sum_{j != i} p_ij,  p_ij = y_i . y_j

    Args:
        embeddings: [N, d], or [E, N, d] for E exits at once; float16, bfloat16, float32 or float64.
        labels: [N] integers of any value, or [N, K] bools or floats >= 0, which are several labels
            or soft ones (a row of zeros is a negative of all others); shared by the exits.
        temperature: a number > 0, or a tensor, which gets its gradient: a scalar, one per sample
            [N], or with exits [E] or [E, N] ([1, N] for all exits). The values of a tensor on a GPU
            are not checked: below 1 / 70 the sums of impl="tiled" overflow.
        denominator: D_i = sum_k exp(s_ik) over "all" rows (arXiv 2602.03563 eq. 1), over the
            "others" (k != i; Khosla et al. 2020) or over the "negatives" (rows of other classes;
            Yeh et al. 2021; an anchor without a negative does not count either).
        reduction: "mean" over the anchors that count, "sum" (the paper), or "none": the L_i.
        ignore_index: a row with this label is left out: it is no anchor, positive or negative.
        process_group: group of the ranks whose gradients are averaged, as in data-parallel training
            (for example `torch.distributed.group.WORLD`). The samples of all its ranks form one
            batch; see below. None: the batch of this process alone.
        impl: "auto" (the fastest here), "reference", "tiled" or "triton".
        pair_memory: bytes, at least 2^20, for exponentials of pairs on a CPU: half a matrix [M, M]
            as far as it fits (64 MiB: 5,600 rows); the rest is computed twice. The result does not
            depend on it. Up to 64 MiB are kept for the next call. Not used on a GPU, in float64, by
            the reference and, without a memory, up to 640 rows.
        positives: for labels [N, K]: "overlap" is the formula above; "each" (MulSupCon, AAAI 2024;
            bools only) makes every label of a row an anchor of its own, whose positives are the
            other rows with that label, and "mean" that over all such anchors.
        ignore_mask: [N] bools; a row with True is left out likewise.
        class_weights: [K] constants >= 0, by which anchors count: L_i of "sum" and "none" is
            multiplied by the weight, and "mean" divides by the sum of weights. Labels are in
            [0, K). A row of several labels has the mean weight of its memberships; with "each"
            every label has its own.
        memory_embeddings: [Q, d] constants, shared by the exits: rows that all anchors compare
            with, but no anchors themselves (a queue of earlier samples).
        memory_labels: [Q] integers or [Q, K], as labels.

    Returns:
        A scalar ([E] with exits; [N] or [E, N] for "none"): float32, or float64 for float64
        embeddings. It is computed in that precision, also under autocast.

    Raises:
        TypeError, ValueError: the message names the argument, its value and a remedy.

    With a process_group of W ranks:
        Every rank passes its own samples, any number of them, the same label embeddings and the
        same options. The rows of all ranks are anchors, positives and negatives; label embeddings
        and their teacher counterparts occur once. When the gradients of the ranks are averaged,
        loss and gradients are, up to rounding, those of one process that holds all samples: "mean"
        and "sum" return the loss of the global batch on every rank, embeddings get W times its
        gradient and label embeddings its whole gradient. All ranks must scale the loss equally.
        Temperatures of samples are treated as the samples, others as label embeddings. The memories
        of all ranks, of the same size Q, together are the memory of every anchor.

        "none" returns the L_i of the rank's own rows: its samples and, on every rank, all label
        embeddings (the same for teacher rows). The averaged gradient is that of the mean over ranks
        of the objective computed from them: W x (sum over the own samples) + (sum over the label
        embeddings) on every rank gives the "sum" of the global batch.

        All ranks of the group must call, in the same order. Different arguments raise on all ranks.
        A loss takes three all-gathers: a short one to agree, the embeddings, and one number per
        row. For "none" the last one is part of the backward pass, where a rank that does not call
        backward makes the other ranks wait until the group's timeout. The other reductions send
        nothing in the backward pass.
    """
    tensors = {"embeddings": embeddings}
    options = Options(
        temperature, denominator, reduction, ignore_index, process_group, impl, pair_memory,
        positives, ignore_mask, class_weights, memory_embeddings, memory_labels,
    )  # fmt: skip
    return _contrastive_loss(labels, tensors, options)


def acl_loss(
    embeddings: Tensor,
    labels: Tensor,
    label_embeddings: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    denominator: str = "all",
    reduction: str = "mean",
    ignore_index: int = -100,
    process_group: ProcessGroup | None = None,
    impl: str = "auto",
    pair_memory: int = PAIR_MEMORY,
    label_temperature: float | Tensor | None = None,
    positives: str = "overlap",
    ignore_mask: Tensor | None = None,
    class_weights: Tensor | None = None,
    memory_embeddings: Tensor | None = None,
    memory_labels: Tensor | None = None,
) -> Tensor:
    """Aligned contrastive loss over samples and label embeddings (ACL-Embed).

    `supcon_loss` over M = N + K rows: the samples, then label embedding k with label k. Both get
    a gradient. See `supcon_loss` for the formula and the other arguments.

    Args:
        embeddings: [N, d], or [E, N, d] for E exits at once.
        labels: [N] integers in [0, K), or `ignore_index`; or [N, K].
        label_embeddings: [K, d] (the weight of an `nn.Linear` classifier as it is), or [E, K, d].
            The dtype is that of `embeddings`; under autocast the two may differ.
        label_temperature: that of label embeddings as anchors, a number or a tensor: a scalar, or
            [E]. None: that of the samples, or the mean of theirs.

    Returns:
        A scalar, or [E]; for reduction "none" [N + K] or [E, N + K], samples first.

    Source: arXiv 2602.03563, section 3 (ACL-Embed).
    """
    tensors = {"embeddings": embeddings, "label_embeddings": label_embeddings}
    options = Options(
        temperature, denominator, reduction, ignore_index, process_group, impl, pair_memory,
        positives, ignore_mask, class_weights, memory_embeddings, memory_labels, label_temperature,
    )  # fmt: skip
    return _contrastive_loss(labels, tensors, options)


def acl_cl_loss(
    embeddings: Tensor,
    labels: Tensor,
    label_embeddings: Tensor,
    teacher_embeddings: Tensor,
    teacher_label_embeddings: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    denominator: str = "all",
    reduction: str = "mean",
    ignore_index: int = -100,
    process_group: ProcessGroup | None = None,
    impl: str = "auto",
    pair_memory: int = PAIR_MEMORY,
    label_temperature: float | Tensor | None = None,
    positives: str = "overlap",
    ignore_mask: Tensor | None = None,
    class_weights: Tensor | None = None,
    memory_embeddings: Tensor | None = None,
    memory_labels: Tensor | None = None,
) -> Tensor:
    """Cross-layer aligned contrastive loss of an exit and its teacher, the last exit (ACL-CL).

    `supcon_loss` over M = 2N + 2K rows: samples, label embeddings, teacher samples, teacher label
    embeddings. Teacher rows are anchors, positives and negatives like the others, but get no
    gradient. See `supcon_loss` for the formula and the other arguments.

    Args:
        embeddings: [N, d], or [E, N, d] for E exits at once.
        labels: [N] integers in [0, K), or `ignore_index`; or [N, K].
        label_embeddings: [K, d], or [E, K, d].
        label_temperature: as for `acl_loss`; also that of all teacher rows.
        teacher_embeddings: [N, d], for the same samples; shared by the exits.
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
    options = Options(
        temperature, denominator, reduction, ignore_index, process_group, impl, pair_memory,
        positives, ignore_mask, class_weights, memory_embeddings, memory_labels, label_temperature,
    )  # fmt: skip
    return _contrastive_loss(labels, tensors, options)


def _contrastive_loss(labels: Tensor, tensors: dict[str, Tensor], options: Options) -> Tensor:
    process_group = options.process_group
    if process_group is not None and torch.compiler.is_compiling():
        raise ValueError(
            "process_group cannot be compiled: the ranks tell each other their sizes first (leave "
            "the loss out of what torch.compile compiles)"
        )
    # A group of one rank has nothing to gather.
    num_ranks = 1 if process_group is None else check_process_group(process_group)
    needs = needs_wider(labels, options)
    try:
        check_options(options)
        if not needs:
            check_number("temperature", options.temperature)
        else:
            for name in ("temperature", "label_temperature"):
                if (value := getattr(options, name)) is not None or name == "temperature":
                    check_temperature_values(name, value)
        check_tensors(tensors, labels, options)
        if not needs:
            check_integers("labels", labels)
        check_shapes(tensors, labels)
        if num_ranks > 1:
            check_device(process_group, tensors["embeddings"].device)
        embeddings = tensors["embeddings"]
        constants = {name: rows.detach() for name, rows in tensors.items() if "teacher" in name}
        batch = Batch(
            embeddings, labels, tensors.get("label_embeddings"),
            constants.get("teacher_embeddings"), constants.get("teacher_label_embeddings"),
            smallest_temperature(options), options.denominator, options.reduction,
            options.ignore_index, options.pair_memory,
        )  # fmt: skip
        wider = None
        if needs:
            wider = make_wider(batch, options)
            check_wider(wider)
        name = dispatch.choose(options.impl, _workload(tensors, options, num_ranks, needs))
    except Exception as error:
        if num_ranks > 1:
            announce_refusal(process_group, error)
        raise
    with without_autocast(embeddings.device.type):
        if num_ranks > 1:
            spread = _agree(process_group, batch, name, wider)
            # Without any sample the rows are the same on every rank, and each computes the loss.
            if wider is not None and (any(spread.num_samples) or wider.memory_labels is not None):
                return sharded_wider.contrastive_loss(name, spread, wider)
            if wider is None and any(spread.num_samples):
                return sharded.contrastive_loss(name, spread, batch)
        if wider is not None:
            return dispatch.wider_function(name, wider)(wider)
        return dispatch.loss_function(name)(batch)


def _workload(
    tensors: dict[str, Tensor], options: Options, num_ranks: int, needs: tuple[str, ...]
) -> dispatch.Workload:
    embeddings = tensors["embeddings"]
    # Under autocast the dtypes may differ: a float64 weight asks for float64 arithmetic.
    is_double = any(tensor.dtype == torch.float64 for tensor in tensors.values())
    dtype = torch.float64 if is_double else embeddings.dtype
    num_rows = sum(tensor.shape[-2] for tensor in tensors.values())
    width = embeddings.shape[-1]
    temperature = smallest_temperature(options)
    return dispatch.Workload(
        embeddings.device, dtype, temperature, num_rows, width, num_ranks, needs
    )


def _agree(
    process_group: ProcessGroup, batch: Batch, name: str, wider: WiderBatch | None
) -> Spread:
    """Return every rank's number of samples once all ranks have agreed on the same loss."""
    num_labels = batch.num_labels or 0
    call = {
        "the number of exits E": batch.leading[0] if batch.leading else None,
        "the width d": batch.embeddings.shape[-1],
        "the number of label embeddings K": num_labels,
        "the dtypes": [str(part.dtype).removeprefix("torch.") for part in batch.parts],
        "the device": batch.embeddings.device.type,
        "temperature": batch.temperature if wider is None else describe_temperatures(wider),
        "denominator": batch.denominator,
        "reduction": batch.reduction,
        "ignore_index": batch.ignore_index,
        "the implementation chosen": name,
    }
    if wider is not None:
        call |= describe(wider)
    num_samples = agree(process_group, batch.embeddings.shape[-2], call)
    rank = torch.distributed.get_rank(process_group)
    return Spread(process_group, rank, num_samples, num_labels, batch.num_copies)
