"""The one-launch kernel against the float64 reference, within twice eager PyTorch's error."""

from typing import Any

import pytest
import torch
from contrastive_cases import (
    DENOMINATORS,
    DEVICE,
    LABELS,
    REDUCTIONS,
    check_error,
    make_inputs,
    run,
)
from fusedacl.kernels import acl_cl_loss, acl_loss, supcon_loss
from fusedacl.kernels.contrastive import dispatch
from fusedacl.kernels.support import machine
from torch import Tensor

pytest.importorskip("triton")
from fusedacl.kernels.contrastive.gpu import small_batches

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KINDS: list[dict[str, Any]] = [
    {"num_labels": None},
    {"num_labels": 3},
    {"num_labels": 11},
    {"num_labels": 3, "teacher": True},
]


@pytest.fixture(autouse=True)
def small_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "SMALL_ROWS", small_batches.MAX_ROWS)


def inputs_of(num_samples: int, num_labels: int | None = None, **kind: Any) -> dict[str, Tensor]:
    return make_inputs(num_samples, num_labels, device=DEVICE, **{"dtype": torch.float32} | kind)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_options(poison: None, denominator: str, reduction: str) -> None:
    """Label layouts and kinds of inputs take turns: each layout meets each kind in some case."""
    for index, make_labels in enumerate(LABELS.values()):
        turn = index + REDUCTIONS.index(reduction) + 2 * DENOMINATORS.index(denominator)
        kind = KINDS[turn % len(KINDS)]
        inputs = inputs_of(7, exits=(None, 2)[index % 2], **kind)
        labels = make_labels(7, kind["num_labels"] or 3).to(DEVICE)
        inputs["embeddings"][..., 2, :] = 0
        inputs["embeddings"][..., labels == -100, :] = torch.nan
        loss = run(inputs, labels, None, impl="reference", reduction=reduction)[0]
        check_error(
            inputs, labels, torch.randn_like(loss), denominator=denominator, reduction=reduction
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_samples", "width"), [(1, 2), (2, 3), (3, 16), (17, 33), (33, 64), (64, 70)]
)
def test_shapes(poison: None, num_samples: int, width: int, dtype: torch.dtype) -> None:
    """On both sides of a tile's and a chunk's edge; the largest has 3 x 3 tiles."""
    inputs = inputs_of(num_samples, 3, width=width, dtype=dtype)
    labels = torch.arange(num_samples, device=DEVICE) % 3
    check_error(inputs, labels, torch.tensor(0.7, device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.5, 0.05, 0.023])
def test_temperatures(temperature: float, dtype: torch.dtype) -> None:
    for denominator in DENOMINATORS:
        inputs = inputs_of(9, 2, width=16, teacher=True, dtype=dtype)
        labels = torch.randint(2, (9,), device=DEVICE)
        options: dict[str, Any] = {"temperature": temperature, "denominator": denominator}
        check_error(inputs, labels, torch.randn(22, device=DEVICE), reduction="none", **options)
        check_error(inputs, labels, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_width_one(dtype: torch.dtype) -> None:
    """Directions are signs and every gradient is 0, up to the rounding of unit-sized terms."""
    inputs = {"embeddings": torch.tensor([[1.0], [-3], [2], [0], [-1]], device=DEVICE).to(dtype)}
    labels = torch.tensor([0, 0, 1, 1, 0], device=DEVICE)
    expected, _ = run(inputs, labels, None, impl="reference")
    loss, gradient = run(inputs, labels, None, impl="triton")
    torch.testing.assert_close(loss, expected)
    assert gradient.abs().max() < 1e-6


def test_opposite_rows_at_the_lowest_temperature() -> None:
    """D near 1e-38, whose inverse times the upstream gradient leaves float32."""
    rows = torch.tensor([[1.0, 0], [1, 0.001], [-1, 0.001], [-1, 0]], device=DEVICE)
    labels = torch.tensor([0, 0, 1, 1], device=DEVICE)
    upstream = torch.full((4,), 65536.0, device=DEVICE)
    for denominator in DENOMINATORS:
        options: dict[str, Any] = {
            "temperature": 0.023, "denominator": denominator, "reduction": "none",
        }  # fmt: skip
        exact = run({"embeddings": rows.double()}, labels, upstream, impl="reference", **options)
        found = run({"embeddings": rows}, labels, upstream, impl="triton", **options)
        # Terms of size upstream / temperature cancel.
        for wanted, got, size in zip(exact, found, (1 / 0.023, 65536 / 0.023), strict=True):
            torch.testing.assert_close(got.double(), wanted.double(), rtol=1e-5, atol=1e-6 * size)


def test_eleven_exits() -> None:
    inputs = inputs_of(30, 2, width=8, exits=11, dtype=torch.float16)
    labels = torch.randint(2, (30,), device=DEVICE)
    check_error(inputs, labels, torch.randn(11, device=DEVICE))


def test_many_rows() -> None:
    inputs = inputs_of(125, 3, width=5)
    check_error(inputs, torch.randint(3, (125,), device=DEVICE))


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has the capability it has")
@pytest.mark.parametrize("capability", [70, 75])
def test_without_a_matrix_unit(monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
    """The chunks and precisions of other GPUs."""
    monkeypatch.setattr(machine, "capability", lambda device: capability)
    assert small_batches.precisions(capability, torch.float16) == ("ieee", "ieee")
    inputs = inputs_of(17, 3, width=70, teacher=True, dtype=torch.float16)
    check_error(inputs, torch.randint(3, (17,), device=DEVICE))


@pytest.mark.parametrize("capability", [70, 75, 80, 86, 89, 90, 100])
def test_variants_name_every_argument_once(capability: int) -> None:
    shipped = small_batches.variants(capability)
    assert len({variant.name for variant in shipped}) == len(shipped)
    for variant in shipped:
        arguments = [*variant.types, *variant.constants]
        assert sorted(arguments) == sorted(variant.kernel.arg_names)
        assert variant.divisible_by_16 <= set(variant.types)
        assert variant.matrix_unit == (capability >= 80)


def test_refusals() -> None:
    inputs = inputs_of(6, 3)
    labels = torch.arange(6, device=DEVICE) % 3
    with pytest.raises(ValueError, match=r"temperature 0.0229 is below 0.023.*impl='tiled'"):
        run(inputs, labels, None, impl="triton", temperature=0.0229)
    with pytest.raises(ValueError, match="embeddings are float64.*impl='tiled'"):
        run(inputs_of(6, 3, dtype=torch.float64), labels, None, impl="triton")
    assert small_batches.obstacle(256, 64, torch.float16, 0.023, 70) is None
    reason = small_batches.obstacle(257, 64, torch.float16, 0.5, 90)
    assert reason is not None
    assert "257 rows are more than the 256" in reason


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_strided_inputs(poison: None, layout: str) -> None:
    strided = {
        "transposed": torch.randn(6, 9, device=DEVICE).t(),
        "sliced": torch.randn(18, 12, device=DEVICE)[::2, ::2],
        "expanded": torch.randn(9, 1, device=DEVICE).expand(9, 6),
    }[layout]
    inputs = {"embeddings": strided, "label_embeddings": torch.randn(6, 3, device=DEVICE).t()}
    inputs["teacher_embeddings"] = strided.flip(0) if layout == "sliced" else strided
    inputs["teacher_label_embeddings"] = torch.randn(3, device=DEVICE)[:, None].expand(3, 6)
    labels = (torch.arange(18, device=DEVICE) % 3)[::2]
    check_error(inputs, labels, torch.randn(1, device=DEVICE).expand(24), reduction="none")
    check_error(inputs, labels)


def test_exits_in_the_middle() -> None:
    """[N, E, d] seen as [E, N, d], as the exits of one forward pass may lie."""
    inputs = inputs_of(5, 2, exits=3)
    inputs["embeddings"] = torch.randn(5, 3, 6, device=DEVICE).transpose(0, 1)
    check_error(inputs, torch.arange(5, device=DEVICE) % 2)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([-7, 10**12, -7, 0, 10**12, -7], torch.int64),
        # Equal in their low 32 bits.
        ([2**40, 2**41, 2**40, 3, 2**41, 2**40], torch.int64),
        ([2, 0, 2, 1, 0, 2], torch.int32),
        ([200, 3, 200, 255, 3, 200], torch.uint8),
        ([-2, 0, -2, 1, 0, -2], torch.int8),
    ],
)
def test_label_values_do_not_matter(values: list[int], dtype: torch.dtype) -> None:
    inputs = inputs_of(6)
    wanted = run(inputs, torch.tensor([0, 1, 0, 2, 1, 0], device=DEVICE), None, impl="triton")
    found = run(inputs, torch.tensor(values, dtype=dtype, device=DEVICE), None, impl="triton")
    for expected, got in zip(wanted, found, strict=True):
        assert torch.equal(expected, got)


def test_ignored_label_of_a_class() -> None:
    """ignore_index 1 takes away the samples of class 1, and leaves its label embedding."""
    for teacher in (False, True):
        inputs = inputs_of(7, 3, teacher=teacher)
        labels = torch.arange(7, device=DEVICE) % 3
        for denominator in DENOMINATORS:
            check_error(inputs, labels, denominator=denominator, ignore_index=1)


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_no_anchor_gives_zero_and_a_graph(denominator: str) -> None:
    """All singletons, one row, no row: loss 0 and gradient 0."""
    for num in (5, 1, 0):
        for reduction in REDUCTIONS:
            loss, gradient = run(
                inputs_of(num), torch.arange(num, device=DEVICE), None, impl="triton",
                denominator=denominator, reduction=reduction,
            )  # fmt: skip
            assert loss.shape == ((num,) if reduction == "none" else ())
            assert (loss == 0).all()
            assert gradient.shape == (num, 6)
            assert (gradient == 0).all()


@pytest.mark.parametrize("kind", [{}, {"teacher": True}, {"exits": 2}, {"exits": 0}])
def test_label_embeddings_alone(poison: None, kind: dict[str, Any]) -> None:
    """N = 0: what the reference gives."""
    labels = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    for reduction in REDUCTIONS:
        check_error(inputs_of(0, 3, **kind), labels, reduction=reduction)


@pytest.mark.parametrize("length", [1e-10, 1e-6, 1e6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lengths_do_not_matter(length: float, dtype: torch.dtype) -> None:
    inputs = inputs_of(6, 2, width=16, dtype=dtype)
    inputs["embeddings"] *= length
    check_error(inputs, torch.arange(6, device=DEVICE) % 2)


def test_zero_vectors() -> None:
    """A vector no longer than 1e-12 has no direction: gradient 0, also for its own row."""
    inputs = inputs_of(6, 2)
    inputs["embeddings"][1] = 0
    inputs["embeddings"][2] *= 1e-14
    _, gradient, _ = check_error(inputs, torch.arange(6, device=DEVICE) % 2)
    assert (gradient[1:3] == 0).all()
    assert (gradient[3] != 0).any()


def test_nan_is_not_hidden() -> None:
    for kind in KINDS:
        for reduction in REDUCTIONS:
            inputs = inputs_of(9, **kind)
            inputs["embeddings"][4, 2] = torch.nan
            labels = torch.arange(9, device=DEVICE) % 3
            loss, gradient, *_ = run(inputs, labels, None, impl="triton", reduction=reduction)
            assert loss.isnan().any()
            assert gradient[4].isnan().all()


def test_nan_of_one_exit_stays_there() -> None:
    inputs = inputs_of(9, exits=3)
    inputs["embeddings"][1, 4] = torch.nan
    loss, gradient = run(inputs, torch.arange(9, device=DEVICE) % 3, None, impl="triton")
    assert loss.isnan().tolist() == [False, True, False]
    assert gradient.isnan().flatten(1).any(1).tolist() == [False, True, False]


def test_nan_does_not_reach_an_ignored_row() -> None:
    inputs = inputs_of(9)
    inputs["embeddings"][4] = torch.nan
    labels = torch.arange(9, device=DEVICE) % 3
    labels[5] = -100
    _, gradient = run(inputs, labels, None, impl="triton")
    assert (gradient[5] == 0).all()


def test_nan_upstream_of_a_row_that_does_not_count() -> None:
    inputs = inputs_of(5)
    labels = torch.tensor([0, 0, 1, -100, 0], device=DEVICE)
    upstream = torch.tensor([1.0, 2, torch.nan, torch.nan, 3], device=DEVICE)
    check_error(inputs, labels, upstream, reduction="none")


def test_mixed_dtypes_under_autocast() -> None:
    """Samples, label embeddings and teacher each in a dtype of their own, gradients in theirs."""
    labels = torch.arange(12, device=DEVICE) % 3
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.bfloat16)
    inputs = {
        name: tensor.to(dtype)
        for (name, tensor), dtype in zip(
            inputs_of(12, 3, teacher=True, width=8).items(), dtypes, strict=True
        )
    }
    floats = {name: tensor.float() for name, tensor in inputs.items()}
    for reduction in REDUCTIONS:
        expected = run(floats, labels, None, impl="triton", reduction=reduction)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            found = run(inputs, labels, None, impl="triton", reduction=reduction)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1].bfloat16())
        assert torch.equal(found[2], expected[2])


def test_only_what_is_trained_gets_a_gradient() -> None:
    """Frozen samples, trained label embeddings; and the other way round; and no gradient at all."""
    labels = torch.arange(6, device=DEVICE) % 3
    for reduction in REDUCTIONS:
        for index, trained in enumerate(("embeddings", "label_embeddings")):
            inputs = inputs_of(6, 3)
            whole = run(inputs, labels, None, impl="triton", reduction=reduction)
            inputs[trained].requires_grad_()
            loss = acl_loss(labels=labels, **inputs, impl="triton", reduction=reduction)
            loss.sum().backward()
            assert {name for name, t in inputs.items() if t.grad is not None} == {trained}
            torch.testing.assert_close(inputs[trained].grad, whole[1 + index])
            with torch.no_grad():
                plain = acl_loss(labels=labels, **inputs, impl="triton", reduction=reduction)
            assert not plain.requires_grad
            assert torch.equal(plain, loss)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_twice_the_same_bits(reduction: str) -> None:
    inputs = inputs_of(30, 5, width=32, exits=2)
    labels = torch.randint(5, (30,), device=DEVICE)
    first, second = (run(inputs, labels, None, impl="triton", reduction=reduction) for _ in "12")
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch gives loss and gradient; "none" takes a second one for the gradient."""
    launches = []
    launch = small_batches.launch
    monkeypatch.setattr(
        small_batches, "launch", lambda *arguments: (launches.append(1), launch(*arguments))
    )
    labels = torch.arange(6, device=DEVICE) % 3
    for reduction, number in (("mean", 1), ("sum", 1), ("none", 2)):
        launches.clear()
        run(inputs_of(6, 3, exits=2), labels, None, impl="triton", reduction=reduction)
        assert len(launches) == number


def test_second_derivative_is_refused() -> None:
    embeddings = torch.randn(4, 3, device=DEVICE, requires_grad=True)
    loss = supcon_loss(embeddings, torch.tensor([0, 0, 1, 1], device=DEVICE), impl="triton")
    with pytest.raises(RuntimeError, match="no second derivative.*impl='reference'"):
        torch.autograd.grad(loss, embeddings, create_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_operators_pass_opcheck(reduction: str) -> None:
    inputs = inputs_of(5, 3, exits=2, teacher=True)
    labels = torch.tensor([0, 1, -100, 0, 2], device=DEVICE)
    samples, label_embeddings, *teachers = inputs.values()
    trained = samples.requires_grad_(), label_embeddings.requires_grad_()
    tensors = (trained[0], labels, trained[1], *teachers)
    torch.library.opcheck(small_batches.supcon_small, (*tensors, 0.5, "all", reduction, -100, 0, 8))
    constants = [tensor.detach() for tensor in tensors]
    upstream = torch.randn(2, 16, device=DEVICE)
    torch.library.opcheck(
        small_batches.supcon_small_backward, (upstream, *constants, 0.5, "all", -100, 0, 8)
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compiles_without_a_graph_break(dtype: torch.dtype, reduction: str) -> None:
    torch.compiler.reset()
    inputs = inputs_of(5, 3, teacher=True, dtype=dtype)
    labels = torch.tensor([0, 1, -100, 0, 2], device=DEVICE)
    samples, label_embeddings, *teachers = inputs.values()

    def loss(samples: Tensor, label_embeddings: Tensor) -> Tensor:
        rows = acl_cl_loss(
            samples * 1.5, labels, label_embeddings, *teachers, impl="triton", reduction=reduction
        )
        return rows.exp().sum()

    trained = samples.requires_grad_(), label_embeddings.requires_grad_()
    # aot_eager traces forward and backward as inductor does and needs no C++ compiler.
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, found = loss(*trained), compiled(*trained)
    torch.testing.assert_close(found, expected)
    for wanted, got in zip(
        torch.autograd.grad(expected, trained), torch.autograd.grad(found, trained), strict=True
    ):
        assert got.dtype == dtype
        torch.testing.assert_close(got, wanted)
