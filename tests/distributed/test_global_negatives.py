"""Negatives of all ranks: the losses and gradients of one process; messages and mistakes."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
from contrastive_cases import (
    DENOMINATORS,
    LABELS,
    REDUCTIONS,
    Inputs,
    make_inputs,
    run,
)
from fusedacl.kernels import acl_cl_loss, acl_loss, supcon_loss
from fusedacl.kernels.contrastive import dispatch
from fusedacl.kernels.contrastive.sharded import agreement
from fusedacl.kernels.contrastive.tiled import loss as tiled
from rank_pool import Ranks
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

SPLITS = ([5, 5], [1, 8], [3, 2, 4, 1], [4, 0, 1, 6])
KINDS: list[dict[str, Any]] = [
    {"num_labels": None},
    {"num_labels": 3},
    {"num_labels": 3, "teacher": True},
    {"num_labels": 11, "teacher": True, "exits": 2},
    {"num_labels": None, "exits": 3},
]
GROUPS: dict[int, Any] = {}


def group_of(num_ranks: int) -> Any:
    """The group of ranks 0 .. num_ranks - 1; every rank must ask."""
    if num_ranks not in GROUPS:
        GROUPS[num_ranks] = distributed.new_group(list(range(num_ranks)))
    return GROUPS[num_ranks]


def own_part(inputs: Inputs, labels: Tensor, sizes: Sequence[int], rank: int) -> Inputs:
    """The part of one rank in the inputs of all, with its labels."""
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    sliced = {
        name: tensor[..., own, :] if "label" not in name else tensor
        for name, tensor in inputs.items()
    }
    return {**sliced, "labels": labels[own]}


def losses_on_rank(rank: int, cases: list[tuple[Any, ...]]) -> list[list[Tensor] | None]:
    """[loss, gradients] of one rank for every case; None where it is no member of the group."""
    results: list[list[Tensor] | None] = []
    for inputs, labels, sizes, upstreams, options in cases:
        group = group_of(len(sizes))
        if rank >= len(sizes):
            results.append(None)
            continue
        own = own_part(inputs, labels, sizes, rank)
        upstream = None if upstreams is None else upstreams[rank]
        results.append(run(own, own.pop("labels"), upstream, process_group=group, **options))
    return results


def losses_in_small_tiles(rank: int, cases: list[tuple[Any, ...]]) -> list[list[Tensor] | None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "TILE", 4)
        patch.setattr(tiled, "FEW_ROWS", 0)
        return losses_on_rank(rank, cases)


def fused_losses_on_rank(rank: int, cases: list[tuple[Any, ...]]) -> list[list[Tensor] | None]:
    from fusedacl.kernels.contrastive.gpu import large_batches, pair_sums, row_steps
    from fusedacl.kernels.contrastive.gpu.tiles import Blocks, Tile

    def small_tiles(capability: int, dtype: torch.dtype, width: int) -> Blocks:
        return Blocks(Tile(32, 16, width, 0, 4, 2), Tile(16, 32, width, width, 4, 2))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "SMALL_ROWS", 0)
        patch.setattr(large_batches, "shipped", small_tiles)
        for module in (pair_sums, row_steps):
            patch.setattr(module, "PADDED_ROWS", 32)
        return losses_on_rank(rank, cases)


def make_case(
    sizes: list[int],
    kind: dict[str, Any],
    layout: str,
    options: dict[str, Any],
    dtype: torch.dtype = torch.float64,
) -> tuple[Any, ...]:
    total = sum(sizes)
    inputs = make_inputs(total, **kind, dtype=dtype)
    labels = LABELS[layout](total, kind["num_labels"] or 3)
    if layout == "random":
        # Sorted: most classes are absent from most ranks.
        labels = labels.sort().values
    inputs["embeddings"][..., 2, :] = 0
    inputs["embeddings"][..., labels == -100, :] = torch.nan
    upstreams: list[Tensor] | None = None
    copies, num_labels = 2 if kind.get("teacher") else 1, kind["num_labels"] or 0
    exits = [kind["exits"]] if kind.get("exits") else []
    if options["reduction"] == "none":
        rows = [copies * (size + num_labels) for size in sizes]
        upstreams = [torch.randn(*exits, number, dtype=torch.float64) for number in rows]
    else:
        upstreams = [torch.randn(exits, dtype=torch.float64)] * len(sizes)
    return inputs, labels, sizes, upstreams, options


def of_all_rows(values: list[Tensor], sizes: list[int], copies: int, combine: Any) -> Tensor:
    """Values [.., M] of one process from those of the ranks' own rows [.., m]."""
    by_copy = [value.unflatten(-1, (copies, -1)) for value in values]
    samples = [value[..., :size] for value, size in zip(by_copy, sizes, strict=True)]
    labels = [value[..., size:] for value, size in zip(by_copy, sizes, strict=True)]
    return torch.cat([*samples, combine(labels)], dim=-1).flatten(-2)


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean(0)


def check(
    results: list[list[Tensor]], case: tuple[Any, ...], *, impl: str, tolerance: float
) -> None:
    """Losses and averaged gradients of the ranks are those of one process with all samples.

    Gradients of samples are those of parameters before them: averaged over ranks, of which one has
    the sample.
    """
    inputs, labels, sizes, upstreams, options = case
    copies = 2 if "teacher_embeddings" in inputs else 1
    losses = [result[0] for result in results]
    if options["reduction"] == "none":
        # The ranks' objective is the mean over ranks of what is made of their losses.
        shares = of_all_rows([u / len(sizes) for u in upstreams], sizes, copies, sum)
        loss = of_all_rows(losses, sizes, copies, lambda labels: labels[0])
    else:
        shares, loss = upstreams[0], losses[0]
        assert all(torch.equal(other, loss) for other in losses)
    exact = {**options, "impl": impl}
    expected = run(inputs, labels, shares, **exact)
    samples = torch.cat([result[1] for result in results], dim=-2) / len(sizes)
    found = [loss, samples]
    if "label_embeddings" in inputs:
        found.append(mean([result[2] for result in results]))
    for wanted, got in zip(expected, found, strict=True):
        assert got.shape == wanted.shape and got.dtype == wanted.dtype
        if wanted.numel():
            allowed = tolerance * max(wanted.double().abs().max().item(), 1e-3)
            error = (got.double() - wanted.double()).abs().max().item()
            assert error <= allowed, f"{sizes} {options}: error {error:.3g}, allowed {allowed:.3g}"


def compare(
    ranks: Ranks,
    cases: list[tuple[Any, ...]],
    *,
    tolerance: float,
    function: Callable[..., Any] = losses_on_rank,
    oracle: str = "reference",
) -> None:
    by_rank = ranks.run(function, cases)
    for index, case in enumerate(cases):
        results = [found[index] for found in by_rank[: len(case[2])]]
        assert all(found[index] is None for found in by_rank[len(case[2]) :])
        check(results, case, impl=oracle, tolerance=tolerance)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_ranks_are_one_process(
    four_ranks: Ranks, impl: str, denominator: str, reduction: str
) -> None:
    """Every kind of loss and layout of labels in float64, on 2 and 4 ranks, also of unequal size.

    Every split with every kind; each combination of options has other layouts with them.
    """
    options = {"denominator": denominator, "reduction": reduction, "impl": impl}
    first = DENOMINATORS.index(denominator) + REDUCTIONS.index(reduction)
    layouts = list(LABELS)
    cases = [
        make_case(sizes, kind, layouts[(first + row + column) % len(layouts)], options)
        for row, sizes in enumerate(SPLITS)
        for column, kind in enumerate(KINDS)
    ]
    compare(four_ranks, cases, tolerance=1e-10)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_in_many_tiles(four_ranks: Ranks, denominator: str, reduction: str) -> None:
    """Own rows that end in the middle of a tile, and class sums by scattering."""
    options = {"denominator": denominator, "reduction": reduction, "impl": "tiled"}
    splits = ([9, 6], [1, 13], [7, 0, 4, 9])
    cases = [
        make_case(list(sizes), kind, layout, options)
        for sizes, kind, layout in itertools.product(splits, KINDS[:4], ("random", "ignored"))
    ]
    compare(four_ranks, cases, tolerance=1e-10, function=losses_in_small_tiles)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_float32_to_rounding(four_ranks: Ranks, reduction: str) -> None:
    """Within 1e-6 of one process in float32, in sizes of training."""
    options = {"reduction": reduction, "impl": "tiled"}
    cases = [
        make_case(sizes, {**kind, "width": 64}, "random", options, torch.float32)
        for sizes in ([48, 48], [32, 32, 32, 1])
        for kind in KINDS[:4]
    ]
    compare(four_ranks, cases, tolerance=1e-6, oracle="tiled")


@pytest.mark.parametrize("impl", ["reference", "tiled"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_samples_are_gathered_exactly(
    four_ranks: Ranks, dtype: torch.dtype, impl: str
) -> None:
    """float32 losses of 16-bit samples do not depend on who holds the samples."""
    options = {"reduction": "mean", "impl": impl}
    cases = [make_case([6, 5], kind, "random", options, dtype) for kind in KINDS[:4]]
    for case in cases:
        for upstream in case[3]:
            upstream.fill_(1)
    by_rank = four_ranks.run(losses_on_rank, cases)
    for index, (inputs, labels, *_) in enumerate(cases):
        loss, *gradients = run(inputs, labels, None, impl=impl)
        for result in by_rank[:2]:
            torch.testing.assert_close(result[index][0], loss, rtol=1e-6, atol=0)
            assert [got.dtype for got in result[index][1:]] == [dtype] * len(gradients)
        samples = torch.cat([result[index][1] for result in by_rank[:2]], dim=-2) / 2
        torch.testing.assert_close(samples, gradients[0], rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_triton_kernels(four_ranks: Ranks, denominator: str, reduction: str) -> None:
    """The fused kernels, which the interpreter runs on the ranks' CPU."""
    options = {"denominator": denominator, "reduction": reduction, "impl": "triton"}
    cases = [
        make_case([9, 6], {"num_labels": 3}, "random", options, torch.float32),
        make_case([4, 3], {"num_labels": 2, "teacher": True, "exits": 2}, "ignored", options,
                  torch.float32),
        make_case([2, 1, 0, 3], {"num_labels": None}, "one class", options, torch.float32),
    ]  # fmt: skip
    doubles = []
    for inputs, labels, sizes, upstreams, chosen in cases:
        doubles.append(
            ({n: t.double() for n, t in inputs.items()}, labels, sizes, upstreams, chosen)
        )
    by_rank = four_ranks.run(fused_losses_on_rank, cases)
    for index, case in enumerate(doubles):
        results = [[t.double() for t in found[index]] for found in by_rank[: len(case[2])]]
        check(results, case, impl="reference", tolerance=3e-6)


def ddp_on_rank(
    rank: int, sizes: list[int], features: Tensor, labels: Tensor, options: dict[str, Any]
) -> dict[str, Tensor]:
    """Gradients after DistributedDataParallel has averaged them."""
    model = DistributedDataParallel(Net())
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    samples, label_embeddings = model(features[own])
    group = distributed.group.WORLD
    acl_loss(samples, labels[own], label_embeddings, process_group=group, **options).backward()
    return {name: p.grad for name, p in model.module.named_parameters() if p.grad is not None}


class Net(nn.Module):
    """Samples from a layer, and a classifier whose weight is the label embeddings."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(5, 6, dtype=torch.float64)
        self.classifier = nn.Linear(6, 3, bias=False, dtype=torch.float64)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        # Not the parameter itself: DDP looks for what the output depends on.
        return self.layer(features).tanh(), self.classifier.weight * 1.0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_data_parallel_training_averages_to_the_one_process_gradient(
    four_ranks: Ranks, reduction: str
) -> None:
    """PyTorch averages the gradients, and batches have unequal sizes."""
    sizes, options = [4, 1, 6, 2], {"reduction": reduction, "temperature": 0.3}
    features, labels = torch.randn(13, 5).double(), torch.randint(3, (13,))
    net = Net()
    samples, label_embeddings = net(features)
    acl_loss(samples, labels, label_embeddings, **options).backward()
    for found in four_ranks.run(ddp_on_rank, sizes, features, labels, options):
        assert found.keys() == dict(net.named_parameters()).keys()
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-10, atol=1e-12)


COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_gather_single", "all_reduce",
    "all_to_all", "all_to_all_single", "barrier", "broadcast", "gather", "reduce",
    "reduce_scatter", "reduce_scatter_single", "reduce_scatter_tensor", "scatter", "send", "recv",
)  # fmt: skip


def messages_on_rank(rank: int, impl: str, reduction: str) -> tuple[list[Any], list[Any]]:
    """(name, bytes sent) of the collectives of a forward and of a backward pass."""
    calls: list[Any] = []

    def logged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(received: Any, sent: Any = None, *arguments: Any, **options: Any) -> Any:
            calls.append((name, sent.nbytes))
            return function(received, sent, *arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in filter(partial(hasattr, distributed), COLLECTIVES):
            patch.setattr(distributed, name, logged(name, getattr(distributed, name)))
        embeddings = torch.randn(4 - rank, 6, dtype=torch.float16, requires_grad=True)
        labels = torch.zeros(4 - rank, dtype=torch.int64)
        loss = acl_loss(
            embeddings, labels, torch.randn(2, 6).half(), reduction=reduction, impl=impl,
            process_group=distributed.group.WORLD,
        )  # fmt: skip
        forward = list(calls)
        calls.clear()
        loss.sum().backward()
        return forward, calls


@pytest.mark.parametrize("impl", ["reference", "tiled"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_three_messages_a_loss(four_ranks: Ranks, reduction: str, impl: str) -> None:
    """They hold 16-bit samples with labels, and one number per row."""
    renamed = hasattr(distributed, "all_gather_single")
    gather = "all_gather_single" if renamed else "all_gather_into_tensor"
    agree, batch = (gather, 520), (gather, 4 * 8 + 4 * 6 * 2)
    # D, and for "none" the weights with it; 4 samples (the largest rank's) and 2 label embeddings.
    rows = (gather, (4 + 2) * 4 * (2 if reduction == "none" else 1))
    expected = ([agree, batch], [rows]) if reduction == "none" else ([agree, batch, rows], [])
    if impl == "reference":
        # It computes all D itself, and sends the weights alone.
        expected = ([agree, batch], [(gather, (4 + 2) * 4)] if reduction == "none" else [])
    for found in four_ranks.run(messages_on_rank, impl, reduction):
        assert found == expected


def test_same_call_same_bits(four_ranks: Ranks) -> None:
    cases = [
        make_case([70, 90, 80, 60], {"num_labels": 5, "width": 24}, "random",
                  {"reduction": reduction, "impl": "tiled"}, torch.float32)
        for reduction in REDUCTIONS
    ]  # fmt: skip
    first, second = four_ranks.run(losses_on_rank, cases), four_ranks.run(losses_on_rank, cases)
    for one, other in zip(itertools.chain(*first), itertools.chain(*second), strict=True):
        for left, right in zip(one, other, strict=True):
            assert torch.equal(left.nan_to_num(), right.nan_to_num())


def test_a_group_of_one_rank_is_no_group(four_ranks: Ranks) -> None:
    case = make_case([7], KINDS[2], "random", {"reduction": "mean", "impl": "auto"})
    compare(four_ranks, [case], tolerance=0.0, oracle="auto")


def without_samples_on_rank(rank: int) -> list[Tensor]:
    embeddings, labels = torch.randn(0, 4, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    rows = torch.arange(8.0).view(2, 4).requires_grad_()
    options = {"process_group": distributed.group.WORLD}
    losses = [supcon_loss(embeddings, labels, **options)]
    losses.append(acl_cl_loss(embeddings, labels, rows, embeddings.detach(), rows + 1, **options))
    torch.stack(losses).sum().backward()
    return [*(loss.detach() for loss in losses), embeddings.grad, rows.grad]


def test_no_samples_on_any_rank(four_ranks: Ranks) -> None:
    """Only label embeddings remain, the same on every rank."""
    rows = torch.arange(8.0).view(2, 4).requires_grad_()
    expected = acl_cl_loss(
        torch.empty(0, 4), torch.zeros(0).long(), rows, torch.empty(0, 4), rows + 1
    )
    expected.backward()
    for plain, aligned, sample_gradient, label_gradient in four_ranks.run(without_samples_on_rank):
        assert plain == 0 and sample_gradient.shape == (0, 4)
        torch.testing.assert_close(aligned, expected.detach())
        torch.testing.assert_close(label_gradient, rows.grad)


def partly_trained_on_rank(rank: int, impl: str) -> list[Any]:
    torch.manual_seed(rank)
    x, y = torch.randn(3, 4, requires_grad=True), torch.tensor([0, 1, rank % 2])
    rows = torch.arange(8.0).view(2, 4) - 3
    teacher = (torch.randn(3, 4, requires_grad=True), rows.flip(0).requires_grad_())
    options: dict[str, Any] = {"process_group": distributed.group.WORLD, "impl": impl}
    found: list[Any] = []
    for trained_rows in (rows, rows.clone().requires_grad_()):
        x.grad = None
        acl_cl_loss(x, y, trained_rows, *teacher, **options).backward()
        found.append(x.grad)
    assert teacher[0].grad is None and teacher[1].grad is None
    frozen = acl_loss(x.detach(), y, rows.clone().requires_grad_(), **options)
    frozen.backward()
    with torch.no_grad():
        found.append(acl_loss(x, y, rows.clone().requires_grad_(), **options))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found.append(acl_loss(x.bfloat16(), y, rows, **options).dtype)
    found.append(frozen)
    return [value.detach() if isinstance(value, Tensor) else value for value in found]


@pytest.mark.parametrize("impl", ["reference", "tiled", "triton"])
def test_constants_and_autocast(four_ranks: Ranks, impl: str) -> None:
    """Frozen label embeddings or samples change nothing else; a teacher gets no gradient."""
    for frozen_rows, trained_rows, no_grad, dtype, frozen in four_ranks.run(
        partly_trained_on_rank, impl
    ):
        torch.testing.assert_close(frozen_rows, trained_rows)
        assert torch.equal(no_grad, frozen)
        assert dtype == torch.float32


def second_derivative_on_rank(rank: int, impl: str) -> str | float:
    x = (torch.arange(8.0).view(4, 2) + rank).double().requires_grad_()
    y = torch.tensor([0, 1, 0, 1])
    loss = supcon_loss(x, y, process_group=distributed.group.WORLD, impl=impl)
    try:
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    except RuntimeError as error:
        return str(error)
    gradient.square().sum().backward()
    return x.grad.abs().sum().item()


def test_second_derivatives_need_the_reference(four_ranks: Ranks) -> None:
    assert all(value > 0 for value in four_ranks.run(second_derivative_on_rank, "reference"))
    for message in four_ranks.run(second_derivative_on_rank, "tiled"):
        assert "only impl='reference'" in message


def mistake_on_rank(rank: int, name: str) -> tuple[str, str]:
    """The error that one mistake gives, and that the next loss is computed again."""
    x, y, w = torch.randn(4, 6), torch.tensor([0, 1, 1, 0]), torch.randn(3, 6)
    options: dict[str, Any] = {"process_group": distributed.group.WORLD}
    wrong: dict[str, tuple[Any, ...]] = {
        "width": (x[:, :5], y, w[:, :5]),
        "labels": (x, y, w[:2]),
        "shape": (x, y[:3], w),
        "dtype": (x.double(), y, w.double()),
        "range": (x, y + 2, w),
        "exits": (x[None], y, w[None]),
    }
    different: dict[str, Any] = {
        "temperature": {"temperature": 0.7},
        "reduction": {"reduction": "sum"},
        "name": {"reduction": "average" + "\0\U0001f600" * 5000},
        "impl": {"impl": "reference"},
    }
    arguments: tuple[Any, ...] = (x, y, w)
    function: Callable[..., Tensor] = acl_loss
    if rank == 2:
        arguments, chosen = wrong.get(name, arguments), different.get(name, {})
        options.update(chosen)
        if name == "function":
            arguments, function = (x, y), supcon_loss
    try:
        function(*arguments, **options)
    except (ValueError, TypeError) as error:
        text = str(error)
    else:
        text = "no error"
    right = acl_loss(x, y, w, process_group=distributed.group.WORLD)
    return text, "again" if math.isfinite(right.item()) else "not finite"


ON_EVERY_RANK = {
    "width": "differ in the width d (6 on ranks 0, 1, 3; 5 on rank 2)",
    "labels": "differ in the number of label embeddings K (3 on ranks 0, 1, 3; 2 on rank 2)",
    "dtype": "differ in the dtypes (['float32', 'float32'] on ranks 0, 1, 3; ['float64', 'float64']"
    " on rank 2)",
    "exits": "differ in the number of exits E (None on ranks 0, 1, 3; 1 on rank 2)",
    "temperature": "differ in temperature (0.5 on ranks 0, 1, 3; 0.7 on rank 2)",
    "reduction": "differ in reduction (mean on ranks 0, 1, 3; sum on rank 2)",
    "impl": "differ in the implementation chosen (tiled on ranks 0, 1, 3; reference on rank 2)",
    "function": "differ in the number of label embeddings K (3 on ranks 0, 1, 3; 0 on rank 2) and "
    "in the dtypes",
    "range": "labels holds 3, but label_embeddings has K = 3 rows",
}
ON_ONE_RANK = {
    "shape": "labels has shape (3,): embeddings (4, 6) needs one label per sample",
    "name": "reduction is 'average",
}


@pytest.mark.parametrize("name", ON_EVERY_RANK)
def test_what_ranks_do_not_share_raises_on_all(four_ranks: Ranks, name: str) -> None:
    for text, after in four_ranks.run(mistake_on_rank, name, seconds=30):
        assert ON_EVERY_RANK[name] in text
        assert after == "again"


@pytest.mark.parametrize("name", ON_ONE_RANK)
def test_one_rank_that_refuses_stops_all(four_ranks: Ranks, name: str) -> None:
    """It raises its own error, and the others raise one that names it."""
    for rank, (text, after) in enumerate(four_ranks.run(mistake_on_rank, name, seconds=30)):
        if rank == 2:
            assert text.startswith(ON_ONE_RANK[name])
        else:
            assert text.startswith("rank 2 of process_group refused its arguments")
            assert ON_ONE_RANK[name][:20] in text
        assert after == "again"


def not_a_member_on_rank(rank: int) -> str:
    group = distributed.new_group([0, 1])
    try:
        supcon_loss(torch.randn(2, 3), torch.zeros(2).long(), process_group=group)
    except ValueError as error:
        return str(error)
    return "a loss"


def test_a_rank_outside_the_group_is_refused(four_ranks: Ranks) -> None:
    inside, also, outside, too = four_ranks.run(not_a_member_on_rank)
    assert inside == also == "a loss"
    assert outside == too and "no member" in outside


def test_what_is_no_group() -> None:
    x, y = torch.randn(2, 3), torch.zeros(2).long()
    with pytest.raises(TypeError, match=r"process_group must be .* not bool .*group\.WORLD"):
        supcon_loss(x, y, process_group=True)
    group = distributed.ProcessGroup(0, 2)
    with pytest.raises(ValueError, match="not initialised"):
        supcon_loss(x, y, process_group=group)


def test_a_device_without_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedacl.kernels.contrastive.sharded import batch as global_rows

    monkeypatch.setattr(global_rows, "device_types", lambda group: ["cuda"])
    with pytest.raises(ValueError, match="embeddings are on cpu and .* for cuda only"):
        agreement.check_device(None, torch.device("cpu"))


def compiled_on_rank(rank: int) -> str:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return supcon_loss(x * 2, y, process_group=distributed.group.WORLD)

    x, y = torch.randn(3, 4), torch.tensor([0, 0, rank])
    try:
        torch.compile(loss, fullgraph=True, backend="eager")(x, y)
    except Exception as error:
        return str(error)
    return "compiled"


def test_it_says_that_it_cannot_be_compiled(four_ranks: Ranks) -> None:
    for text in four_ranks.run(compiled_on_rank):
        assert "process_group cannot be compiled" in text


def one_forgets_backward_on_rank(rank: int, reduction: str) -> str:
    distributed.barrier()
    group = distributed.new_group(timeout=timedelta(seconds=6))
    x = torch.randn(3, 4, requires_grad=True)
    loss = supcon_loss(x, torch.zeros(3).long(), reduction=reduction, process_group=group)
    if rank == 1:
        return "forgot"
    start = time.monotonic()
    try:
        loss.sum().backward()
    except RuntimeError:
        return "gave up in time" if time.monotonic() - start < 20 else "gave up late"
    return "done"


def test_a_rank_without_backward() -> None:
    """It holds up nobody where the backward pass sends nothing, else until the group's timeout."""
    with Ranks(2) as ranks:
        assert ranks.run(one_forgets_backward_on_rank, "mean") == ["done", "forgot"]
        assert ranks.run(one_forgets_backward_on_rank, "none") == ["gave up in time", "forgot"]


def test_dispatch_never_takes_one_launch_for_rows_of_several_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fusedacl.kernels.support import machine

    for module in (dispatch, machine):
        monkeypatch.setattr(module, "capability", lambda device: 90)
    workload = dispatch.Workload(torch.device("cuda"), torch.float16, num_rows=34, num_ranks=2)
    assert dispatch.choose("auto", workload) == dispatch.choose("triton", workload)
    assert dispatch.choose("auto", workload) == "supcon_fused"
    assert "34 rows on each of 2 ranks" in dispatch.explain(workload)
