"""The kernels of large batches against float64 and eager PyTorch, with small tiles."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contrastive_cases import (
    DENOMINATORS,
    DEVICE,
    DTYPES,
    LABELS,
    REDUCTIONS,
    check_error,
    make_inputs,
    run,
    use_implementation,
)
from fusedacl.kernels.contrastive import dispatch
from fusedacl.kernels.contrastive.batch import Batch
from fusedacl.kernels.contrastive.gpu import large_batches, pair_sums, row_steps
from fusedacl.kernels.contrastive.gpu.tiles import Blocks, Tile

# NumPy, in the interpreter, warns of the NaN and infinity that some tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


@pytest.fixture(autouse=True)
def fused_with_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    use_implementation(monkeypatch, "fused")


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
    shipped = large_batches.shipped(80, z.dtype, 32)
    assert large_batches.tiles(z) == shipped
    measured = Tile(64, 64, 32, 32, 4, 3)
    monkeypatch.setattr(
        large_batches, "tuned", lambda name, *kind: measured if name == "pair_gradient" else None
    )
    assert large_batches.tiles(z) == Blocks(shipped.forward, measured)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_smallest_exponentials_do_not_vanish(dtype: torch.dtype) -> None:
    """Two opposite rows at the lowest temperature: exp(-2 / 0.023) = 1.7e-38, and loss 0."""
    x = torch.randn(1, 8, device=DEVICE)
    inputs = {"embeddings": torch.cat([x, -x]).to(dtype)}
    labels = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    loss, gradient = run(
        inputs, labels, None, impl="triton", temperature=0.023, denominator="others"
    )
    assert abs(loss.item()) < 0.05
    assert gradient.isfinite().all()


def test_a_loss_scale_does_not_overflow() -> None:
    """An upstream gradient of 65536 scales a float16 gradient exactly."""
    inputs = make_inputs(40, 5, width=32, dtype=torch.float16, device=DEVICE)
    labels = LABELS["random"](40, 5).to(DEVICE)
    for reduction in ("mean", "none"):
        upstream = torch.ones((45,) if reduction == "none" else (), device=DEVICE)
        options = {"impl": "triton", "reduction": reduction}
        for factor in (2.0**16, 2.0**-3):
            plain = run(inputs, labels, upstream, **options)
            scaled = run(inputs, labels, upstream * factor, **options)
            for small, large in zip(plain[1:], scaled[1:], strict=True):
                wanted = small.float() * factor
                inside = (wanted.abs() < 65000) & (wanted.abs() > 1e-4)
                # Below float16's normal numbers the unscaled gradient is less precise.
                inside &= small.abs() > 1e-4
                assert inside.any()
                torch.testing.assert_close(large.float()[inside], wanted[inside])


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_far_below_the_largest(dtype: torch.dtype) -> None:
    """The upstream gradient of one anchor is a millionth of the others', that of another is 0."""
    inputs = make_inputs(40, 5, width=32, dtype=dtype, device=DEVICE)
    labels = LABELS["random"](40, 5).to(DEVICE)
    upstream = torch.ones(45, device=DEVICE)
    upstream[3], upstream[7] = 1e-6, 0
    check_error(inputs, labels, upstream, reduction="none")
    check_error(inputs, labels, torch.zeros_like(upstream), reduction="none")


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


class NoKernel:
    """A kernel whose launches do nothing."""

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
        batch = Batch(
            inputs["embeddings"], labels, inputs.get("label_embeddings"), None, None,
            0.5, "all", "none", -100,
        )  # fmt: skip
        trained = True, num_labels is not None
        _, saved = large_batches.forward(batch, *trained)
        large_batches.backward(torch.ones(65536), saved, batch.shape(*trained))
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
