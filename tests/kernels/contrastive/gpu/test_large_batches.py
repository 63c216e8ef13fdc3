"""The kernels of large batches against float64 and eager PyTorch, with small tiles."""

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
from fusedacl.kernels.contrastive.gpu import large_batches, pair_sums, row_steps, splits
from fusedacl.kernels.contrastive.gpu.tiles import Blocks, Tile

# NumPy, in the interpreter, warns of the NaN and infinity that some tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


@pytest.fixture(autouse=True)
def fused_with_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    use_implementation(monkeypatch, "fused")


@pytest.mark.parametrize(
    "width, dtype",
    [(20, torch.float16), (64, torch.bfloat16), (128, torch.float32), (256, torch.float16),
     (300, torch.float16)],
)  # fmt: skip
def test_with_the_shipped_tiles(
    monkeypatch: pytest.MonkeyPatch, width: int, dtype: torch.dtype
) -> None:
    """Rows wider than 256 come in chunks; several programs compute a row of the gradient."""
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
def test_weights_far_below_the_largest(dtype: torch.dtype) -> None:
    """The upstream gradient of one anchor is a millionth of the others', that of another is 0."""
    inputs = make_inputs(40, 5, width=32, dtype=dtype, device=DEVICE)
    labels = LABELS["random"](40, 5).to(DEVICE)
    upstream = torch.ones(45, device=DEVICE)
    upstream[3], upstream[7] = 1e-6, 0
    check_error(inputs, labels, upstream, reduction="none")
    check_error(inputs, labels, torch.zeros_like(upstream), reduction="none")


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("triangle", [False, True])
def test_splits_of_the_columns_change_nothing_but_rounding(
    monkeypatch: pytest.MonkeyPatch, poison: None, triangle: bool, denominator: str
) -> None:
    if triangle:
        monkeypatch.setattr(pair_sums, "TRIANGLE_BLOCKS", 2)
        tile = Tile(32, 16, 32, 0, 4, 2)
        blocks = Blocks(tile, Tile(16, 32, 32, 32, 4, 2))
        monkeypatch.setattr(large_batches, "tiles", lambda z: blocks)
    inputs = make_inputs(70, 5, width=8, dtype=torch.float32, device=DEVICE)
    labels = LABELS["random"](70, 5).to(DEVICE)
    found = []
    for multiprocessors in (1, 6, 1000):
        monkeypatch.setattr(splits, "num_multiprocessors", lambda device, num=multiprocessors: num)
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
