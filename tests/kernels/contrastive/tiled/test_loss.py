"""The tiled implementation against the reference, in float64 and within its float32 rounding."""

import itertools
from typing import Any

import pytest
import torch
from contrastive_cases import (
    DENOMINATORS,
    LABELS,
    REDUCTIONS,
    Inputs,
    loss_function,
    make_inputs,
    operator_arguments,
    run,
)
from fusedacl.kernels import acl_cl_loss, acl_loss, supcon_loss
from fusedacl.kernels.contrastive.tiled import cpu_loop
from fusedacl.kernels.contrastive.tiled import loss as supcon_tiled
from torch import Tensor


def set_tile(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    """Tiles of that many rows; class sums by mask only where the tile is the shipped one."""
    monkeypatch.setattr(cpu_loop, "MAX_ROWS", 0)
    monkeypatch.setattr(supcon_tiled, "TILE", tile)
    monkeypatch.setattr(supcon_tiled, "ONE_TILE", tile * tile)
    monkeypatch.setattr(supcon_tiled, "FEW_ROWS", 128 if tile == 512 else 0)


def compare(inputs: Inputs, labels: Tensor, **options: Any) -> None:
    shape = loss_function(inputs)(labels=labels, **inputs, impl="reference", **options).shape
    upstream = torch.randn(shape)
    expected = run(inputs, labels, upstream, impl="reference", **options)
    found = run(inputs, labels, upstream, impl="tiled", **options)
    for wanted, got in zip(expected, found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("tile", [4, 512])
def test_equals_the_reference(
    monkeypatch: pytest.MonkeyPatch, poison: None, tile: int, denominator: str, reduction: str
) -> None:
    """Every label layout, with and without exits, label embeddings and teacher."""
    set_tile(monkeypatch, tile)
    kinds: list[dict[str, Any]] = [
        {"num_labels": None},
        {"num_labels": 3},
        {"num_labels": 11},
        {"num_labels": 3, "teacher": True},
    ]
    for make_labels, exits, kind in itertools.product(LABELS.values(), (None, 3), kinds):
        inputs = make_inputs(7, exits=exits, **kind)
        labels = make_labels(7, kind["num_labels"] or 3)
        inputs["embeddings"][..., 2, :] = 0
        inputs["embeddings"][..., labels == -100, :] = torch.nan
        compare(inputs, labels, denominator=denominator, reduction=reduction)


@pytest.mark.parametrize("num_samples", [0, 1, 2, 7, 8, 9, 16, 17, 25])
def test_every_edge_of_a_tile(monkeypatch: pytest.MonkeyPatch, num_samples: int) -> None:
    set_tile(monkeypatch, 8)
    labels = torch.arange(num_samples) % 3
    for num_labels, teacher in ((None, False), (3, False), (3, True)):
        for denominator in DENOMINATORS:
            inputs = make_inputs(num_samples, num_labels, teacher=teacher)
            compare(inputs, labels, denominator=denominator, reduction="none")


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_no_anchor_gives_zero_and_a_graph(
    monkeypatch: pytest.MonkeyPatch, denominator: str
) -> None:
    """All singletons: loss 0, and gradients that are there and 0."""
    for tile, impl in ((2, "tiled"), (512, "tiled"), (512, "reference")):
        set_tile(monkeypatch, tile)
        embeddings = torch.randn(5, 4, requires_grad=True)
        loss = supcon_loss(embeddings, torch.arange(5), denominator=denominator, impl=impl)
        loss.backward()
        assert loss.item() == 0
        assert embeddings.grad is not None
        assert (embeddings.grad == 0).all()


def test_label_values_do_not_matter() -> None:
    """Any integers, in any order, are the same classes."""
    embeddings = torch.randn(6, 4)
    expected = supcon_loss(embeddings, torch.tensor([0, 1, 0, 2, 1, 0]))
    for values in ([-7, 10**12, -7, 0, 10**12, -7], [2, 0, 2, 1, 0, 2]):
        torch.testing.assert_close(supcon_loss(embeddings, torch.tensor(values)), expected)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_strided_inputs(layout: str) -> None:
    strided = {
        "transposed": torch.randn(6, 9, dtype=torch.float64).t(),
        "sliced": torch.randn(18, 12, dtype=torch.float64)[::2, ::2],
        "expanded": torch.randn(9, 1, dtype=torch.float64).expand(9, 6),
    }[layout]
    inputs = {"embeddings": strided, "label_embeddings": torch.randn(6, 3).double().t()}
    compare(inputs, torch.arange(9) % 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.5, 0.05])
@pytest.mark.parametrize("num_rows", [40, 300])
def test_error_is_that_of_eager_pytorch(
    monkeypatch: pytest.MonkeyPatch, num_rows: int, temperature: float, dtype: torch.dtype
) -> None:
    """Against float64: at most twice the largest error of the reference in the same dtype.

    The floor (two units in the last place of the largest value) is for results that the reference
    happens to round exactly.
    """
    set_tile(monkeypatch, 64)
    inputs = make_inputs(num_rows, 5, width=32, teacher=True, dtype=dtype)
    labels = torch.randint(5, (num_rows,))
    doubles = {name: tensor.double() for name, tensor in inputs.items()}
    for denominator, reduction in itertools.product(DENOMINATORS, REDUCTIONS):
        options = {
            "temperature": temperature, "denominator": denominator, "reduction": reduction,
        }  # fmt: skip
        exact = run(doubles, labels, None, impl="reference", **options)
        eager = run(inputs, labels, None, impl="reference", **options)
        tiled = run(inputs, labels, None, impl="tiled", **options)
        for wanted, same_dtype, got in zip(exact, eager, tiled, strict=True):
            assert got.dtype == same_dtype.dtype
            allowed = 2 * (same_dtype.double() - wanted).abs().max()
            allowed += 2 * torch.finfo(got.dtype).eps * wanted.abs().max()
            assert (got.double() - wanted).abs().max() <= allowed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    """Loss in float32 (float64 for float64); each gradient in the dtype of its input."""
    inputs = make_inputs(6, 3, dtype=dtype)
    for impl in ("tiled", "reference"):
        loss, *gradients = run(inputs, torch.arange(6) % 3, None, impl=impl)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert [gradient.dtype for gradient in gradients] == [dtype, dtype]


@pytest.mark.parametrize("temperature", [0.015, 0.002, 0.0002])
def test_tiny_temperatures(temperature: float) -> None:
    """float32 up to 1 / 70, float64 inside up to 1 / 690, beyond that the reference."""
    inputs = make_inputs(9, 3, dtype=torch.float32)
    labels = torch.arange(9) % 3
    doubles = {name: tensor.double() for name, tensor in inputs.items()}
    exact = run(doubles, labels, None, temperature=temperature, impl="reference")
    found = run(inputs, labels, None, temperature=temperature)
    for wanted, got in zip(exact, found, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-3 / temperature * 1e-2)
    if temperature < 1 / 690:
        with pytest.raises(ValueError, match="temperature 0.0002 is below 1 / 690.*reference"):
            run(inputs, labels, None, temperature=temperature, impl="tiled")


@pytest.mark.parametrize("tile", [4, 512])
@pytest.mark.parametrize("impl", ["tiled", "reference"])
def test_nan_is_not_hidden(monkeypatch: pytest.MonkeyPatch, impl: str, tile: int) -> None:
    set_tile(monkeypatch, tile)
    inputs = make_inputs(9, dtype=torch.float32)
    inputs["embeddings"][4, 2] = torch.nan
    loss, gradient = run(inputs, torch.arange(9) % 3, None, impl=impl)
    assert loss.isnan()
    assert gradient.isnan().any()


@pytest.mark.parametrize("tile", [8, 512])
def test_twice_the_same_bits(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    set_tile(monkeypatch, tile)
    inputs = make_inputs(40, 5, width=32, exits=2, teacher=True, dtype=torch.float32)
    labels = torch.randint(5, (40,))
    first, second = (run(inputs, labels, None, impl="tiled") for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("tile", [4, 512])
@pytest.mark.parametrize("impl", ["tiled", "reference"])
def test_autocast_does_not_reach_inside(
    monkeypatch: pytest.MonkeyPatch, impl: str, tile: int
) -> None:
    """A bfloat16 activation beside a float32 weight: the same bits as without autocast.

    The tiled backward pass may itself run under autocast; that of the reference is PyTorch's.
    """
    set_tile(monkeypatch, tile)
    labels = torch.arange(12) % 3
    samples = torch.randn(12, 8).bfloat16()
    label_embeddings = torch.randn(3, 8)
    floats = {"embeddings": samples.float(), "label_embeddings": label_embeddings}
    expected = run(floats, labels, None, impl=impl)

    trained = samples.requires_grad_(), label_embeddings.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = acl_loss(trained[0], labels, trained[1], impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=impl == "tiled"):
        gradients = torch.autograd.grad(loss, trained)
    assert torch.equal(loss.detach(), expected[0])
    assert torch.equal(gradients[0], expected[1].bfloat16())
    assert torch.equal(gradients[1], expected[2])


def test_only_what_is_trained_gets_a_gradient() -> None:
    """Frozen samples, trained label embeddings; and the other way round; and no gradient at all."""
    labels = torch.arange(6) % 3
    for trained in ("embeddings", "label_embeddings"):
        inputs = make_inputs(6, 3)
        inputs[trained].requires_grad_()
        acl_loss(labels=labels, **inputs, impl="tiled").backward()
        assert {name for name, t in inputs.items() if t.grad is not None} == {trained}
    with torch.no_grad():
        assert not acl_loss(labels=labels, **inputs, impl="tiled").requires_grad


def test_second_derivative_is_refused() -> None:
    embeddings = torch.randn(4, 3, requires_grad=True)
    loss = supcon_loss(embeddings, torch.tensor([0, 0, 1, 1]), impl="tiled")
    with pytest.raises(RuntimeError, match="no second derivative.*impl='reference'"):
        torch.autograd.grad(loss, embeddings, create_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("tile", [4, 512])
def test_operators_pass_opcheck(monkeypatch: pytest.MonkeyPatch, tile: int, reduction: str) -> None:
    set_tile(monkeypatch, tile)
    torch.library.opcheck(supcon_tiled.supcon_tiled, operator_arguments(reduction))


@pytest.mark.parametrize("impl", ["tiled", "reference"])
@pytest.mark.parametrize("tile", [4, 512])
def test_compiles_without_a_graph_break(
    monkeypatch: pytest.MonkeyPatch, impl: str, tile: int
) -> None:
    set_tile(monkeypatch, tile)
    torch.compiler.reset()
    inputs = make_inputs(5, 3, teacher=True, dtype=torch.float32)
    labels = torch.tensor([0, 1, -100, 0, 2])
    samples, label_embeddings, *teachers = inputs.values()

    def loss(samples: Tensor, label_embeddings: Tensor, labels: Tensor) -> Tensor:
        return acl_cl_loss(samples * 1.5, labels, label_embeddings, *teachers, impl=impl).exp()

    trained = samples.requires_grad_(), label_embeddings.requires_grad_()
    # aot_eager traces forward and backward as inductor does and needs no C++ compiler.
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, found = loss(*trained, labels), compiled(*trained, labels)
    torch.testing.assert_close(found, expected)
    for wanted, got in zip(
        torch.autograd.grad(expected, trained), torch.autograd.grad(found, trained), strict=True
    ):
        torch.testing.assert_close(got, wanted)
    with pytest.raises(ValueError, match=r"labels holds 7, but label_embeddings has K = 3"):
        compiled(*trained, torch.tensor([0, 1, -100, 7, 2]))
