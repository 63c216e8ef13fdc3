"""Messages between ranks that share negatives, and mistakes that must stop all of them."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
from contrastive_cases import REDUCTIONS
from fusedacl.kernels import acl_cl_loss, acl_loss, supcon_loss
from fusedacl.kernels.contrastive import dispatch
from fusedacl.kernels.contrastive.sharded import agreement
from negatives_cases import losses_on_rank, make_case
from rank_pool import Ranks
from torch import Tensor, distributed

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
    """Which say no more than they must: 16-bit samples with labels, and a number a row."""
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
    """With its own error there, and on the others with one that names it."""
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
    monkeypatch.setattr(agreement, "device_types", lambda group: ["cuda"])
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
