"""Tests of all implementations: autograd, torch.compile, autocast, strides, special inputs."""

import itertools
from typing import Any

import pytest
import torch
from contrastive_cases import (
    DENOMINATORS,
    DEVICE,
    DTYPES,
    KINDS,
    LABELS,
    REDUCTIONS,
    check_error,
    combine,
    make_inputs,
    run,
    use_implementation,
)
from fusedacl.kernels import acl_cl_loss, acl_loss, supcon_loss
from fusedacl.kernels.contrastive import dispatch
from fusedacl.kernels.contrastive.batch import Batch
from fusedacl.kernels.contrastive.dispatch import Workload
from fusedacl.kernels.contrastive.gpu import large_batches, small_batches
from fusedacl.kernels.contrastive.tiled import loss as tiled
from torch import Tensor

# NumPy, in the interpreter, warns of NaN and infinity.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

MODULES = {
    # The compiled loop, except for reduction "none".
    "tiled": tiled,
    # The compiled loop for many rows.
    "triangle": tiled,
    "tiles of 4 rows": tiled,
    "tiles on a GPU": tiled,
    "small": small_batches,
    "fused": large_batches,
}
NAMES = ("reference", *MODULES)
# Numbers of samples around the blocks of each implementation, widths and temperatures.
GRIDS: dict[str, tuple[tuple[float, ...], ...]] = {
    "tiled": (
        (0, 1, 5, 6, 7, 12, 15, 16, 17, 31, 33, 96), (8, 15, 16, 17, 64), (5, 0.5, 0.05, 0.015),
    ),
    "triangle": ((0, 1, 47, 95, 96, 97, 193), (3, 31, 33, 64, 130), (5, 0.5, 0.05, 0.015)),
    "tiles of 4 rows": ((0, 1, 2, 4, 5, 8, 9, 40), (6, 32), (0.5, 0.05)),
    "small": ((0, 1, 2, 3, 17, 33, 64), (2, 3, 16, 33, 64, 70), (0.5, 0.05, 0.023)),
    # Wide rows come in chunks, and several programs compute a row of the gradient.
    "fused": ((0, 1, 15, 32, 33), (6, 33, 70, 130, 300), (0.5, 0.05, 0.023)),
}  # fmt: skip
if DEVICE == "cuda":
    GRIDS["fused with the shipped tiles"] = (
        (1, 2, 17, 33, 61, 130), (3, 20, 64, 70, 130, 256, 768), (0.5, 0.05, 0.023),
    )  # fmt: skip


@pytest.mark.parametrize("name", GRIDS)
def test_error_is_that_of_eager_pytorch(
    monkeypatch: pytest.MonkeyPatch, poison: None, name: str
) -> None:
    """Any two of size, width, temperature, dtype, labels, exits, inputs and the two options."""
    impl = use_implementation(monkeypatch, name)
    if impl == "triton":
        reason = dispatch.obstacle("supcon_" + name.split()[0], Workload(torch.device(DEVICE)))
        if reason is not None:
            pytest.skip(reason)
    factors = *GRIDS[name], DTYPES, tuple(LABELS), (None, 1, 3), KINDS, DENOMINATORS, REDUCTIONS
    for num_samples, width, temperature, dtype, layout, exits, kind, *of_loss in combine(*factors):
        denominator, reduction = of_loss
        inputs = make_inputs(
            num_samples, width=width, exits=exits, dtype=dtype, device=DEVICE, **kind
        )
        labels = LABELS[layout](num_samples, kind["num_labels"] or 3).to(DEVICE)
        inputs["embeddings"][..., 2:3, :] = 0
        inputs["embeddings"][..., labels == -100, :] = torch.nan
        # Rows are scaled before they reach this loop, and again in it: s is rounded twice.
        leeway = 5.0 if name == "triangle" and reduction == "none" else 1.0
        options = {
            "temperature": temperature, "denominator": denominator, "reduction": reduction,
        }  # fmt: skip
        loss, *_ = run(inputs, labels, None, impl="reference", **options)
        in_float32 = DEVICE == "cpu" and name in ("tiled", "triangle", "tiles of 4 rows")
        upstream = torch.randn_like(loss)
        check_error(
            inputs, labels, upstream, impl=impl, eager_in_float32=in_float32, leeway=leeway,
            **options,
        )  # fmt: skip


@pytest.fixture(params=NAMES)
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return use_implementation(monkeypatch, request.param)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", MODULES)
def test_operators_pass_opcheck(monkeypatch: pytest.MonkeyPatch, name: str, reduction: str) -> None:
    use_implementation(monkeypatch, name)
    implementation = MODULES[name].implementation
    inputs = make_inputs(5, 3, exits=2, teacher=True, dtype=torch.float32, device=DEVICE)
    labels = torch.tensor([0, 1, -100, 0, 2], device=DEVICE)
    samples, *others = inputs.values()
    batch = Batch(samples, labels, *others, 0.5, "all", reduction, -100)
    trained = samples.clone().requires_grad_(), labels, others[0].clone().requires_grad_()
    torch.library.opcheck(implementation.operator, (*trained, *batch[3:], True, True))
    loss, saved = implementation.forward(batch, True, True)
    saved += implementation.inputs_to_save(batch)
    arguments = (torch.ones_like(loss), saved, *batch.shape(True, True))
    torch.library.opcheck(implementation.backward_operator, arguments)


@pytest.mark.parametrize(
    "name, dtype, reduction, frozen",
    [
        ("reference", torch.float32, "mean", False),
        ("tiled", torch.float32, "mean", False),
        ("tiles of 4 rows", torch.float16, "none", False),
        ("tiles of 4 rows", torch.float32, "mean", True),
        ("small", torch.float32, "mean", False),
        ("small", torch.float16, "none", False),
        ("small", torch.float32, "none", True),
        ("small", torch.float16, "mean", True),
        ("fused", torch.float32, "mean", False),
        ("fused", torch.float16, "none", True),
    ],
)
def test_compiles_without_a_graph_break(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, reduction: str, frozen: bool
) -> None:
    """Compiled results and gradients are the same, also with frozen label embeddings."""
    impl = use_implementation(monkeypatch, name)
    torch.compiler.reset()
    inputs = make_inputs(5, 3, teacher=True, dtype=dtype, device=DEVICE)
    labels = torch.tensor([0, 1, -100, 0, 2], device=DEVICE)
    samples, label_embeddings, *teachers = inputs.values()

    def loss(samples: Tensor, label_embeddings: Tensor, labels: Tensor) -> Tensor:
        rows = acl_cl_loss(
            samples * 1.5, labels, label_embeddings, *teachers, impl=impl, reduction=reduction
        )
        return rows.exp().sum()

    arguments = samples.requires_grad_(), label_embeddings.requires_grad_(not frozen), labels
    trained = [argument for argument in arguments if argument.requires_grad]
    # aot_eager traces forward and backward as inductor does and needs no C++ compiler.
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, found = loss(*arguments), compiled(*arguments)
    torch.testing.assert_close(found, expected)
    for wanted, got in zip(
        torch.autograd.grad(expected, trained), torch.autograd.grad(found, trained), strict=True
    ):
        assert got.dtype == dtype
        torch.testing.assert_close(got, wanted)
    if DEVICE == "cpu" and impl != "triton":
        with pytest.raises(ValueError, match=r"labels holds 7, but label_embeddings has K = 3"):
            compiled(*arguments[:2], torch.tensor([0, 1, -100, 7, 2]))


def test_only_trained_inputs_get_a_gradient(impl: str) -> None:
    """Frozen samples, frozen label embeddings, and no gradient at all."""
    labels = torch.arange(9, device=DEVICE) % 3
    for reduction in REDUCTIONS:
        options: dict[str, Any] = {"impl": impl, "reduction": reduction}
        inputs = make_inputs(9, 3, dtype=torch.float32, device=DEVICE)
        expected = dict(zip(inputs, run(inputs, labels, None, **options)[1:], strict=True))
        for trained in inputs:
            frozen = {name: tensor.clone() for name, tensor in inputs.items()}
            frozen[trained].requires_grad_()
            loss = acl_loss(labels=labels, **frozen, **options)
            loss.sum().backward()
            assert {name for name, t in frozen.items() if t.grad is not None} == {trained}
            torch.testing.assert_close(frozen[trained].grad, expected[trained])
            with torch.no_grad():
                plain = acl_loss(labels=labels, **frozen, **options)
            assert not plain.requires_grad
            torch.testing.assert_close(plain, loss)


def test_same_bits_when_called_twice(impl: str) -> None:
    inputs = make_inputs(33, 5, width=20, exits=2, teacher=True, dtype=torch.float32, device=DEVICE)
    labels = torch.randint(5, (33,), device=DEVICE)
    for reduction in REDUCTIONS:
        first, second = (
            run(inputs, labels, None, impl=impl, reduction=reduction) for _ in range(2)
        )
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_without_an_anchor_loss_and_gradient_are_zero(
    poison: None, impl: str, denominator: str
) -> None:
    """Only singletons, one row, no row: the gradient exists and is 0."""
    for num, dtype in ((20, torch.float16), (5, torch.float32), (1, torch.bfloat16), (0, None)):
        for reduction in REDUCTIONS:
            inputs = make_inputs(num, dtype=dtype or torch.float32, device=DEVICE)
            loss, gradient = run(
                inputs, torch.arange(num, device=DEVICE), None,
                impl=impl, denominator=denominator, reduction=reduction,
            )  # fmt: skip
            assert loss.shape == ((num,) if reduction == "none" else ())
            assert (loss == 0).all()
            assert gradient.shape == (num, 6)
            assert (gradient == 0).all()


def test_nan_and_infinity_are_not_hidden(impl: str) -> None:
    for value, dtype, denominator in zip(
        (torch.nan, torch.inf, torch.nan),
        (torch.float16, torch.bfloat16, torch.float32),
        DENOMINATORS,
        strict=True,
    ):
        for reduction in ("mean", "none"):
            inputs = make_inputs(40, dtype=dtype, device=DEVICE)
            inputs["embeddings"][34, 2] = value
            labels = torch.arange(40, device=DEVICE) % 3
            options = {"denominator": denominator, "reduction": reduction}
            loss, gradient = run(inputs, labels, None, impl=impl, **options)
            assert loss.isnan().any()
            assert gradient.isnan().any()


@pytest.mark.parametrize("impl", MODULES, indirect=True)
def test_second_derivative_is_refused(impl: str) -> None:
    embeddings = torch.randn(4, 3, requires_grad=True, device=DEVICE)
    loss = supcon_loss(embeddings, torch.tensor([0, 0, 1, 1], device=DEVICE), impl=impl)
    with pytest.raises(RuntimeError, match="no second derivative.*impl='reference'"):
        torch.autograd.grad(loss, embeddings, create_graph=True)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("impl", MODULES, indirect=True)
def test_strided_inputs(poison: None, impl: str, layout: str) -> None:
    """Inputs, labels and upstream gradients with any strides give the bits of contiguous ones."""
    strided = {
        "transposed": torch.randn(6, 9, device=DEVICE).t(),
        "sliced": torch.randn(18, 12, device=DEVICE)[::2, ::2],
        "expanded": torch.randn(9, 1, device=DEVICE).expand(9, 6),
    }[layout]
    inputs = {"embeddings": strided, "label_embeddings": torch.randn(6, 3, device=DEVICE).t()}
    inputs["teacher_embeddings"] = strided.flip(0) if layout == "sliced" else strided
    inputs["teacher_label_embeddings"] = torch.randn(3, device=DEVICE)[:, None].expand(3, 6)
    labels = (torch.arange(18, device=DEVICE) % 3)[::2]
    dense = {key: tensor.contiguous() for key, tensor in inputs.items()}
    upstream = torch.randn(1, device=DEVICE).expand(24)
    for reduction, weights in (("none", upstream), ("mean", None)):
        options = {"impl": impl, "reduction": reduction}
        expected = run(dense, labels.contiguous(), weights, **options)
        found = run(inputs, labels, weights, **options)
        for wanted, got in zip(expected, found, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    "values, dtype",
    [
        ([-7, 10**12, -7, 0, 10**12, -7], torch.int64),
        # Equal in their low 32 bits.
        ([2**40, 2**41, 2**40, 3, 2**41, 2**40], torch.int64),
        ([2, 0, 2, 1, 0, 2], torch.int32),
        ([200, 3, 200, 255, 3, 200], torch.uint8),
        ([-2, 0, -2, 1, 0, -2], torch.int8),
    ],
)
@pytest.mark.parametrize("impl", ["tiled", "tiles of 4 rows", "small"], indirect=True)
def test_only_the_equality_of_labels_matters(
    impl: str, values: list[int], dtype: torch.dtype
) -> None:
    inputs = make_inputs(6, dtype=torch.float32, device=DEVICE)
    wanted = run(inputs, torch.tensor([0, 1, 0, 2, 1, 0], device=DEVICE), None, impl=impl)
    found = run(inputs, torch.tensor(values, dtype=dtype, device=DEVICE), None, impl=impl)
    for expected, got in zip(wanted, found, strict=True):
        torch.testing.assert_close(expected, got)


@pytest.mark.parametrize("name", NAMES)
def test_mixed_dtypes_under_autocast(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Computed from the inputs as float32; gradients have the inputs' dtypes.

    The backward pass may run under autocast too, except that of the reference, which is PyTorch's.
    """
    impl = use_implementation(monkeypatch, name)
    labels = torch.arange(12, device=DEVICE) % 3
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.bfloat16)
    values = make_inputs(12, 3, width=8, teacher=True, dtype=torch.float32, device=DEVICE).items()
    inputs = {key: x.to(dtype) for (key, x), dtype in zip(values, dtypes, strict=True)}
    floats = {key: tensor.float() for key, tensor in inputs.items()}
    # The products of large batches on a GPU are those of float16 numbers.
    in_half = name in ("fused", "tiles on a GPU") or (DEVICE == "cuda" and "tiles" in name)
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if in_half else {"rtol": 0.0, "atol": 0.0}
    for reduction in REDUCTIONS:
        options = {"impl": impl, "reduction": reduction}
        expected = run(floats, labels, None, **options)
        trained = [inputs["embeddings"].clone(), inputs["label_embeddings"].clone()]
        arguments = [x.requires_grad_() for x in trained]
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            loss = acl_cl_loss(
                arguments[0], labels, arguments[1], *list(inputs.values())[2:], **options
            )
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=name != "reference"):
            gradients = torch.autograd.grad(loss.sum(), arguments)
        for wanted, got, dtype in zip(
            expected, (loss.detach(), *gradients), (torch.float32, *dtypes[:2]), strict=True
        ):
            assert got.dtype == dtype
            torch.testing.assert_close(got, wanted.to(dtype), **tolerance)


@pytest.mark.parametrize("impl", ["tiles on a GPU", "small", "fused"], indirect=True)
def test_a_loss_scale_does_not_overflow(impl: str) -> None:
    """An upstream gradient of 65536 scales a float16 gradient exactly."""
    inputs = make_inputs(40, 5, width=32, dtype=torch.float16, device=DEVICE)
    labels = LABELS["random"](40, 5).to(DEVICE)
    for reduction, factor in itertools.product(("mean", "none"), (2.0**16, 2.0**-3)):
        upstream = torch.ones((45,) if reduction == "none" else (), device=DEVICE)
        plain = run(inputs, labels, upstream, impl=impl, reduction=reduction)
        scaled = run(inputs, labels, upstream * factor, impl=impl, reduction=reduction)
        for small, large in zip(plain[1:], scaled[1:], strict=True):
            wanted = small.float() * factor
            # Below float16's normal numbers a gradient is less precise.
            inside = (wanted.abs() < 65000) & (wanted.abs() > 1e-4) & (small.abs() > 1e-4)
            assert inside.any()
            torch.testing.assert_close(large.float()[inside], wanted[inside])
