"""Messages between ranks that share negatives, and mistakes that must stop all of them."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from contrastive_cases import REDUCTIONS
from fusedacl.kernels import acl_cl_loss, acl_loss, supcon_loss
from fusedacl.kernels.contrastive.sharded import agreement
from negatives_cases import losses_on_rank, make_case
from rank_pool import Ranks
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode


class Messages(TorchDispatchMode):
    """Records (name, bytes sent) of collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls.append((func._schema.name.removeprefix("c10d::"), args[1].nbytes))
        return func(*args, **(kwargs or {}))


def messages_on_rank(rank: int, impl: str, reduction: str) -> list[list[tuple[str, int]]]:
    """The messages of a forward and of a backward pass."""
    embeddings = torch.randn(4 - rank, 6, dtype=torch.float16, requires_grad=True)
    labels = torch.zeros(4 - rank, dtype=torch.int64)
    options = {"reduction": reduction, "impl": impl, "process_group": distributed.group.WORLD}
    with Messages() as forward:
        loss = acl_loss(embeddings, labels, torch.randn(2, 6).half(), **options)
    with Messages() as backward:
        loss.sum().backward()
    return [forward.calls, backward.calls]


@pytest.mark.parametrize("impl", ["reference", "tiled"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_three_messages_a_loss(four_ranks: Ranks, reduction: str, impl: str) -> None:
    """Which say no more than they must: 16-bit samples with labels, and a number a row."""
    agree, batch = 520, 4 * 8 + 4 * 6 * 2
    # D, and for "none" the weights with it; 4 samples (the largest rank's) and 2 label embeddings.
    rows = (4 + 2) * 4 * (2 if reduction == "none" else 1)
    expected = [[agree, batch], [rows]] if reduction == "none" else [[agree, batch, rows], []]
    if impl == "reference":
        # It computes all D itself, and sends the weights alone.
        expected = [[agree, batch], [(4 + 2) * 4] if reduction == "none" else []]
    gathers = [[("_allgather_base_", number) for number in numbers] for numbers in expected]
    for found in four_ranks.run(messages_on_rank, impl, reduction):
        assert found == gathers


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
    text = error_of(lambda: function(*arguments, **options))
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
# Raised on the rank itself; the error of the others names it.
ON_ONE_RANK = {
    "shape": "labels has shape (3,): embeddings (4, 6) needs one label per sample",
    "name": "reduction is 'average",
}


@pytest.mark.parametrize("name", [*ON_EVERY_RANK, *ON_ONE_RANK])
def test_a_mistake_of_one_rank_stops_all(four_ranks: Ranks, name: str) -> None:
    for rank, (text, after) in enumerate(four_ranks.run(mistake_on_rank, name, seconds=30)):
        if name in ON_EVERY_RANK:
            assert ON_EVERY_RANK[name] in text
        elif rank == 2:
            assert text.startswith(ON_ONE_RANK[name])
        else:
            assert text.startswith("rank 2 of process_group refused its arguments")
            assert ON_ONE_RANK[name][:20] in text
        assert after == "again"


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return str(error)
    return "no error"


def not_a_member_on_rank(rank: int) -> str:
    x, y, group = torch.randn(2, 3), torch.zeros(2).long(), distributed.new_group([0, 1])
    return error_of(lambda: supcon_loss(x, y, process_group=group))


def test_a_rank_outside_the_group_is_refused(four_ranks: Ranks) -> None:
    inside, also, outside, too = four_ranks.run(not_a_member_on_rank)
    assert inside == also == "no error"
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
    return error_of(lambda: torch.compile(loss, fullgraph=True, backend="eager")(x, y))


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
