"""The fused kernels against float64 and eager PyTorch, with tiles so small that all edges occur."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contrastive_cases import (
    DENOMINATORS,
    DEVICE,
    LABELS,
    REDUCTIONS,
    Inputs,
    check_error,
    loss_function,
    make_inputs,
    operator_arguments,
    run,
)
from fusedacl.kernels import acl_cl_loss, acl_loss, supcon_loss
from fusedacl.kernels.contrastive import dispatch
from fusedacl.kernels.contrastive.gpu import large_batches, pair_sums, row_steps
from fusedacl.kernels.contrastive.gpu.tiles import Blocks, Tile
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LAYOUTS: dict[str, Callable[[int, int], Tensor]] = {
    **LABELS,
    "all singletons": lambda num, num_labels: torch.arange(num),
}


def small_tiles(capability: int, dtype: torch.dtype, width: int) -> Blocks:
    chunk, output = min(width, 64), min(width, 128)
    return Blocks(Tile(32, 16, chunk, 0, 4, 2), Tile(16, 32, chunk, output, 4, 2))


# NumPy, in the interpreter, remarks on the NaN and inf that some tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


@pytest.fixture(autouse=True)
def fused_with_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "SMALL_ROWS", 0)
    monkeypatch.setattr(large_batches, "shipped", small_tiles)
    # The interpreter needs as long for padding as for rows.
    for module in (pair_sums, row_steps):
        monkeypatch.setattr(module, "PADDED_ROWS", 32)


def upstream_for(inputs: Inputs, labels: Tensor, **options: Any) -> Tensor:
    loss = loss_function(inputs)(labels=labels, **inputs, impl="reference", **options)
    return torch.randn(loss.shape, device=loss.device)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_error_is_that_of_eager_pytorch(poison: None, denominator: str, reduction: str) -> None:
    """Every label layout, with shapes, dtypes, exits, label embeddings and teachers in turns."""
    options = {"denominator": denominator, "reduction": reduction}
    shapes: list[dict[str, Any]] = [
        {"num_samples": 40, "width": 1},
        {"num_samples": 33, "num_labels": 5, "width": 6},
        {"num_samples": 17, "num_labels": 3, "width": 33, "teacher": True, "exits": 3},
        {"num_samples": 5, "num_labels": 50, "width": 70, "exits": 1},
        {"num_samples": 31, "width": 16, "exits": 3},
        {"num_samples": 20, "num_labels": 4, "width": 17, "teacher": True},
    ]
    dtypes = itertools.cycle(DTYPES)
    for shape, (layout, make_labels) in zip(shapes, LAYOUTS.items(), strict=True):
        num_labels = shape.get("num_labels")
        if layout == "all singletons" and num_labels is not None:
            make_labels = LAYOUTS["random"]
        inputs = make_inputs(**shape, dtype=next(dtypes), device=DEVICE)
        labels = make_labels(shape["num_samples"], num_labels or 3).to(DEVICE)
        inputs["embeddings"][..., 2, :] = 0
        inputs["embeddings"][..., labels == -100, :] = torch.nan
        check_error(inputs, labels, upstream_for(inputs, labels, **options), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [130, 300])
def test_wide_rows_come_in_chunks(poison: None, dtype: torch.dtype, width: int) -> None:
    """Similarities from chunks of the width, and the gradient's width from several programs."""
    inputs = make_inputs(30, 4, width=width, dtype=dtype, device=DEVICE)
    labels = LABELS["random"](30, 4).to(DEVICE)
    for denominator, reduction in (("all", "none"), ("others", "mean")):
        options = {"denominator": denominator, "reduction": reduction}
        check_error(inputs, labels, upstream_for(inputs, labels, **options), **options)


@pytest.mark.parametrize(
    "width, dtype",
    [(20, torch.float16), (64, torch.bfloat16), (128, torch.float32), (256, torch.float16)],
)
def test_with_the_shipped_tiles(
    monkeypatch: pytest.MonkeyPatch, width: int, dtype: torch.dtype
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(dispatch, "SMALL_ROWS", 0)
    inputs = make_inputs(150, 7, width=width, dtype=dtype, device=DEVICE)
    check_error(inputs, LABELS["random"](150, 7).to(DEVICE), denominator="others")


def test_measured_tiles_go_before_shipped_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.zeros(1, 128, 32, dtype=torch.float16, device=DEVICE)
    shipped = small_tiles(80, z.dtype, 32)
    assert large_batches.tiles(z) == shipped
    measured = Tile(64, 64, 32, 32, 4, 3)
    monkeypatch.setattr(
        large_batches, "tuned", lambda name, *kind: measured if name == "pair_gradient" else None
    )
    assert large_batches.tiles(z) == Blocks(shipped.forward, measured)


@pytest.mark.parametrize("num_samples", [0, 1, 15, 32, 33])
def test_every_edge_of_a_tile(poison: None, num_samples: int) -> None:
    labels = (torch.arange(num_samples) % 3).to(DEVICE)
    for num_labels, denominator in itertools.product((None, 3), DENOMINATORS):
        inputs = make_inputs(num_samples, num_labels, dtype=torch.float32, device=DEVICE)
        check_error(inputs, labels, denominator=denominator, reduction="none")


def test_all_singletons_have_loss_and_gradient_zero(poison: None) -> None:
    for denominator, dtype in zip(DENOMINATORS, DTYPES, strict=True):
        inputs = make_inputs(20, dtype=dtype, device=DEVICE)
        labels = torch.arange(20, device=DEVICE)
        loss, gradient = run(inputs, labels, None, impl="triton", denominator=denominator)
        assert loss.item() == 0
        assert (gradient == 0).all()


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_strided_inputs_are_read_where_they_lie(layout: str) -> None:
    strided = {
        "transposed": torch.randn(6, 39).t(),
        "sliced": torch.randn(78, 12)[::2, ::2],
        "expanded": torch.randn(39, 1).expand(39, 6),
    }[layout].to(DEVICE)
    inputs = {"embeddings": strided, "label_embeddings": torch.randn(6, 3).to(DEVICE).t()}
    check_error(inputs, (torch.arange(39) % 3).to(DEVICE))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("temperature", [0.5, 0.05, 0.023])
def test_temperatures(temperature: float, dtype: torch.dtype) -> None:
    inputs = make_inputs(40, 5, width=32, dtype=dtype, device=DEVICE)
    labels = LABELS["random"](40, 5).to(DEVICE)
    for denominator, reduction in (("all", "mean"), ("others", "none"), ("negatives", "sum")):
        options = {
            "temperature": temperature, "denominator": denominator, "reduction": reduction,
        }  # fmt: skip
        check_error(inputs, labels, upstream_for(inputs, labels, **options), **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_smallest_exponentials_do_not_vanish(dtype: torch.dtype) -> None:
    """Only pair: opposite rows at the lowest temperature, exp(-2 / 0.023) = 1.7e-38; loss 0."""
    x = torch.randn(1, 8, device=DEVICE)
    inputs = {"embeddings": torch.cat([x, -x]).to(dtype)}
    labels = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    loss, gradient = run(
        inputs, labels, None, impl="triton", temperature=0.023, denominator="others"
    )
    assert abs(loss.item()) < 0.05
    assert gradient.isfinite().all()


def test_a_loss_scale_does_not_overflow() -> None:
    """An upstream gradient of 65536 scales a float16 gradient exactly, and its largest number."""
    inputs = make_inputs(40, 5, width=32, dtype=torch.float16, device=DEVICE)
    labels = LABELS["random"](40, 5).to(DEVICE)
    for reduction in ("mean", "none"):
        upstream = torch.ones_like(upstream_for(inputs, labels, reduction=reduction))
        options = {"impl": "triton", "reduction": reduction}
        for factor in (2.0**16, 2.0**-3):
            plain = run(inputs, labels, upstream, **options)
            scaled = run(inputs, labels, upstream * factor, **options)
            for small, large in zip(plain[1:], scaled[1:], strict=True):
                wanted = small.float() * factor
                inside = (wanted.abs() < 65000) & (wanted.abs() > 1e-4)
                # Below float16's normal numbers the unscaled one is the rougher.
                inside &= small.abs() > 1e-4
                assert inside.any()
                torch.testing.assert_close(large.float()[inside], wanted[inside])


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_far_below_the_largest(dtype: torch.dtype) -> None:
    """One anchor's upstream gradient is a millionth of the others', one is 0."""
    inputs = make_inputs(40, 5, width=32, dtype=dtype, device=DEVICE)
    labels = LABELS["random"](40, 5).to(DEVICE)
    upstream = torch.ones(45, device=DEVICE)
    upstream[3], upstream[7] = 1e-6, 0
    check_error(inputs, labels, upstream, reduction="none")
    check_error(inputs, labels, torch.zeros_like(upstream), reduction="none")


def test_nan_is_not_hidden() -> None:
    for (denominator, dtype), value in itertools.product(
        zip(DENOMINATORS, DTYPES, strict=True), (torch.nan, torch.inf)
    ):
        inputs = make_inputs(40, dtype=dtype, device=DEVICE)
        inputs["embeddings"][34, 2] = value
        labels = (torch.arange(40) % 3).to(DEVICE)
        loss, gradient = run(inputs, labels, None, impl="triton", denominator=denominator)
        assert loss.isnan()
        assert gradient.isnan().any()


def test_twice_the_same_bits() -> None:
    inputs = make_inputs(33, 5, width=20, exits=2, dtype=DTYPES[0], device=DEVICE)
    labels = LABELS["random"](33, 5).to(DEVICE)
    for reduction in ("mean", "none"):
        first, second = (
            run(inputs, labels, None, impl="triton", reduction=reduction) for _ in range(2)
        )
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_splits_of_the_columns_change_nothing_but_rounding(
    monkeypatch: pytest.MonkeyPatch, poison: None, denominator: str
) -> None:
    inputs = make_inputs(70, 5, width=8, dtype=torch.float32, device=DEVICE)
    labels = LABELS["random"](70, 5).to(DEVICE)
    found = []
    for multiprocessors in (1, 6, 1000):
        monkeypatch.setattr(
            pair_sums, "num_multiprocessors", lambda device, num=multiprocessors: num
        )
        found.append(run(inputs, labels, None, impl="triton", denominator=denominator))
    for split in found[1:]:
        for wanted, got in zip(found[0], split, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


def test_class_sums_in_splits(monkeypatch: pytest.MonkeyPatch, poison: None) -> None:
    monkeypatch.setattr(row_steps, "ROWS_PER_SPLIT", 4)
    inputs = make_inputs(60, 3, dtype=torch.float32, device=DEVICE)
    labels = LABELS["ignored"](60, 3).to(DEVICE)
    for reduction in REDUCTIONS:
        check_error(inputs, labels, reduction=reduction)


def test_only_what_is_trained_gets_a_gradient() -> None:
    """Frozen samples, frozen label embeddings, and no gradient at all."""
    labels = torch.arange(36, device=DEVICE) % 3
    inputs = make_inputs(36, 3, dtype=torch.float32, device=DEVICE)
    expected = dict(zip(inputs, run(inputs, labels, None, impl="reference")[1:], strict=True))
    for trained in inputs:
        frozen = {name: tensor.clone() for name, tensor in inputs.items()}
        frozen[trained].requires_grad_()
        acl_loss(labels=labels, **frozen, impl="triton").backward()
        assert {name for name, t in frozen.items() if t.grad is not None} == {trained}
        torch.testing.assert_close(frozen[trained].grad, expected[trained])
        with torch.no_grad():
            assert not acl_loss(labels=labels, **frozen, impl="triton").requires_grad


def test_mixed_dtypes_under_autocast() -> None:
    """bfloat16 samples beside float32 label embeddings: float16 products, own gradient dtypes."""
    labels = torch.arange(36, device=DEVICE) % 3
    inputs = make_inputs(36, 3, width=16, dtype=torch.float32, device=DEVICE)
    inputs["embeddings"] = inputs["embeddings"].bfloat16()
    floats = {name: tensor.float() for name, tensor in inputs.items()}
    expected = run(floats, labels, None, impl="reference")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = run(inputs, labels, None, impl="triton")
    assert [tensor.dtype for tensor in found] == [torch.float32, torch.bfloat16, torch.float32]
    for wanted, got in zip(expected, found, strict=True):
        torch.testing.assert_close(got.float(), wanted, rtol=1e-2, atol=1e-4)


def test_second_derivative_is_refused() -> None:
    embeddings = torch.randn(4, 3, requires_grad=True, device=DEVICE)
    loss = supcon_loss(embeddings, torch.tensor([0, 0, 1, 1], device=DEVICE), impl="triton")
    with pytest.raises(RuntimeError, match="no second derivative.*impl='reference'"):
        torch.autograd.grad(loss, embeddings, create_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_operators_pass_opcheck(reduction: str) -> None:
    torch.library.opcheck(large_batches.supcon_fused, operator_arguments(reduction, DEVICE))


@pytest.mark.parametrize("frozen", [False, True])
def test_compiles_without_a_graph_break(frozen: bool) -> None:
    torch.compiler.reset()
    inputs = make_inputs(5, 3, teacher=True, dtype=torch.float32, device=DEVICE)
    labels = torch.tensor([0, 1, -100, 0, 2], device=DEVICE)
    samples, label_embeddings, *teachers = inputs.values()

    def loss(samples: Tensor, label_embeddings: Tensor, labels: Tensor) -> Tensor:
        return acl_cl_loss(samples * 1.5, labels, label_embeddings, *teachers, impl="triton").exp()

    arguments = samples.requires_grad_(), label_embeddings.requires_grad_(not frozen), labels
    trained = [argument for argument in arguments if argument.requires_grad]
    # aot_eager traces forward and backward as inductor does and needs no C++ compiler.
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, found = loss(*arguments), compiled(*arguments)
    torch.testing.assert_close(found, expected)
    for wanted, got in zip(
        torch.autograd.grad(expected, trained), torch.autograd.grad(found, trained), strict=True
    ):
        torch.testing.assert_close(got, wanted)


class NoKernel:
    """Stands in for a kernel; its launches do nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *_, **__: None


@pytest.mark.parametrize("num_labels", [None, 16])
def test_memory_is_that_of_the_rows(
    monkeypatch: pytest.MonkeyPatch, num_labels: int | None
) -> None:
    """65536 float16 rows of width 64: at most 100 MB beside the inputs, gradients included."""
    monkeypatch.undo()
    for module in (pair_sums, row_steps):
        for name in list(vars(module)):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, NoKernel())
    num_samples = 65536 - (num_labels or 0)
    inputs = make_inputs(num_samples, num_labels, width=64, dtype=torch.float16)
    labels = torch.randint(10, (num_samples,))
    with torch.profiler.profile(profile_memory=True) as profile:
        _, saved = large_batches.forward(
            inputs["embeddings"], labels, inputs.get("label_embeddings"), None, None,
            0.5, "all", "none", -100, True,
        )  # fmt: skip
        large_batches.backward(
            torch.ones(65536), saved, num_samples, num_labels, 64, 65536, 0.5, "all", "none",
            torch.float16, None if num_labels is None else torch.float16,
        )  # fmt: skip
    events = profile.profiler.kineto_results.events()
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    assert 30e6 < max(itertools.accumulate(change for _, change in changes)) < 100e6


def test_what_cannot_run_is_said_in_words() -> None:
    for arguments, message in (
        ((4096, 64, torch.float16, 0.5, 75), "7.5 has no matrix unit.*impl='tiled'"),
        ((4096, 64, torch.float64, 0.5, 90), "float64.*impl='tiled'"),
        ((4096, 1025, torch.float16, 0.5, 90), "width 1025 is above 1024.*impl='tiled'"),
        ((4096, 64, torch.float16, 0.0229, 90), "temperature 0.0229 is below 0.023.*'tiled'"),
    ):
        reason = large_batches.obstacle(*arguments)
        assert reason is not None
        with pytest.raises(ValueError, match=message):
            raise ValueError(reason)
    assert large_batches.obstacle(4096, 1024, torch.bfloat16, 0.023, 80) is None


def test_variants_name_every_argument() -> None:
    for capability in (80, 90):
        found = large_batches.variants(capability)
        assert len({variant.name for variant in found}) == len(found)
        for variant in found:
            assert not set(variant.types) & set(variant.constants)
            assert set(variant.types) | set(variant.constants) == set(variant.kernel.arg_names)
    assert large_batches.variants(75) == []
