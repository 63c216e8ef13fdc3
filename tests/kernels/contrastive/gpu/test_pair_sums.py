"""The sums over pairs against their formulas, also for the first rows alone."""

import itertools

import pytest
import torch
from contrastive_cases import DENOMINATORS, DEVICE, LABELS
from fusedacl.kernels.contrastive.gpu import pair_sums, splits, tiles
from fusedacl.kernels.contrastive.gpu.large_batches import MAX_WIDTH
from fusedacl.kernels.contrastive.gpu.tiles import Tile
from torch import Tensor

TEMPERATURE = 0.5
FORWARD = Tile(32, 16, 32, 0, 4, 2)
BACKWARD = Tile(16, 32, 32, 32, 4, 2)


def padded_with(value: float, tensor: Tensor) -> Tensor:
    """The tensor [.., M], with rows of this value appended up to the number that kernels need."""
    num_rows = tensor.shape[-1]
    missing = pair_sums.padded(num_rows) - num_rows
    return torch.nn.functional.pad(tensor, (0, missing), value=value)


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("num_rows", [30, 70])
def test_first_rows_with_all_columns(poison: None, denominator: str, num_rows: int) -> None:
    """The rows of one rank of a distributed batch, or all rows; every third row is ignored."""
    num_columns = 70
    z = torch.nn.functional.normalize(torch.randn(2, num_columns, 32, device=DEVICE), dim=-1)
    u = torch.rand(2, num_columns, device=DEVICE)
    classes = LABELS["ignored"](num_columns, 4).to(DEVICE)
    exists = classes != -100
    z[:, ~exists], u[:, ~exists], classes[~exists] = 0, 0, 4
    shift = torch.tensor(-pair_sums.exponent_scale(TEMPERATURE), device=DEVICE)
    shifts = padded_with(-torch.inf, shift.where(exists, -torch.inf))

    all_z, all_u = padded_with(0, z.mT).mT.contiguous(), padded_with(0, u)
    all_classes = padded_with(4, classes.int())
    sizes = (num_rows, num_columns, TEMPERATURE, denominator)
    sums = pair_sums.row_sums(all_z, shifts, all_classes, *sizes, FORWARD)
    gradient = pair_sums.pair_gradient(all_z, all_u, shifts, all_classes, *sizes, BACKWARD)

    z, u = z.double(), u.double()
    e = ((z @ z.mT - 1) / TEMPERATURE).exp() * exists
    others = ~torch.eye(num_columns, dtype=torch.bool, device=DEVICE)
    if denominator == "negatives":
        e = e * (classes[:, None] != classes)
    elif denominator == "others":
        e = e * others
    torch.testing.assert_close(sums.sum(0).double(), e.sum(-1)[:, :num_rows], rtol=1e-5, atol=1e-6)
    wanted = (e * others * (u[:, :, None] + u[:, None, :])) @ z
    found = gradient.sum(0).double()
    torch.testing.assert_close(found, wanted[:, :num_rows], rtol=1e-5, atol=1e-5)


# The columns of a block are as many as its rows, or half of them; 70 and 97 fill no last block.
TRIANGLES = (Tile(16, 16, 32, 0, 4, 2), Tile(32, 16, 32, 0, 4, 2))


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("tile", TRIANGLES)
@pytest.mark.parametrize("multiprocessors", [1, 1000])
def test_a_triangle_has_the_sums_of_all_pairs(
    poison: None, monkeypatch: pytest.MonkeyPatch, multiprocessors: int, tile: Tile,
    denominator: str,
) -> None:  # fmt: skip
    """In one split of the columns, or many; every third row is ignored."""
    monkeypatch.setattr(pair_sums, "TRIANGLE_BLOCKS", 2)
    monkeypatch.setattr(splits, "num_multiprocessors", lambda device: multiprocessors)
    for num_rows in (33, 70, 97):
        z = torch.nn.functional.normalize(torch.randn(2, num_rows, 32, device=DEVICE), dim=-1)
        classes = LABELS["ignored"](num_rows, 4).to(DEVICE)
        exists = classes != -100
        z[:, ~exists], classes[~exists] = 0, 4
        shift = torch.tensor(-pair_sums.exponent_scale(TEMPERATURE), device=DEVICE)
        arguments = (
            padded_with(0, z.mT).mT.contiguous(),
            padded_with(-torch.inf, shift.where(exists, -torch.inf)),
            padded_with(4, classes.int()),
        )
        found = pair_sums.symmetric_row_sums(*arguments, num_rows, TEMPERATURE, denominator, tile)
        assert found.rows_per_part == tile.rows
        assert (found.num_splits > 1) == (multiprocessors > 1)
        whole = pair_sums.row_sums(
            *arguments, num_rows, num_rows, TEMPERATURE, denominator, tile
        ).sum(0)
        found_sums, wanted = found.total()[:, exists], whole[:, exists]
        torch.testing.assert_close(found_sums, wanted, rtol=1e-5, atol=1e-6)


def test_a_triangle_where_it_is_worth_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_triangle(num_rows: int, tile: Tile) -> bool:
        z = torch.zeros(1, pair_sums.padded(num_rows), 32, device=DEVICE)
        shifts = torch.zeros(z.shape[1], device=DEVICE)
        arguments = (z, shifts, shifts.int(), num_rows, TEMPERATURE, "all", tile)
        return pair_sums.symmetric_row_sums(*arguments).rows_per_part == tile.rows

    square, wide = Tile(16, 16, 32, 0, 4, 2), Tile(16, 32, 32, 0, 4, 2)
    assert is_triangle(16 * pair_sums.TRIANGLE_BLOCKS, square)
    assert not is_triangle(16 * (pair_sums.TRIANGLE_BLOCKS - 1), square)
    # A block of columns would lie on both sides of a block of rows.
    assert not is_triangle(16 * pair_sums.TRIANGLE_BLOCKS, wide)
    monkeypatch.setattr(pair_sums, "MAX_TRIANGLE_BYTES", 1000)
    assert not is_triangle(16 * pair_sums.TRIANGLE_BLOCKS, square)


def test_a_triangle_is_split_for_its_longest_program() -> None:
    """M = 16384 on an A100: the first of 128 programs would last as long as 3.4 mean ones."""
    num_splits, blocks = splits.balanced_triangle(128, 1, 256, 2, 108)
    assert num_splits * blocks >= 256 and num_splits >= 4
    # One multiprocessor does all of them anyway.
    assert splits.balanced_triangle(4, 1, 8, 2, 1) == (1, 8)
    for row_blocks, exits in itertools.product((2, 9, 128), (1, 12)):
        num_splits, blocks = splits.balanced_triangle(row_blocks, exits, 2 * row_blocks, 2, 132)
        assert (num_splits - 1) * blocks < 2 * row_blocks <= num_splits * blocks


def test_columns_are_split_until_the_gpu_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are 10 blocks of columns for each of 10 programs, two of which hide their waiting."""
    for multiprocessors, splits_and_blocks in ((1000, (10, 1)), (20, (4, 3)), (1, (1, 10))):
        monkeypatch.setattr(splits, "num_multiprocessors", lambda device, num=multiprocessors: num)
        found = splits.split_columns(10, 155, FORWARD, 0, torch.device(DEVICE), 1)
        assert found == splits_and_blocks


def test_multiprocessors_end_at_the_same_time() -> None:
    """M = 16384 on an A100: 128 programs of 256 blocks would leave 41 % of 108 multiprocessors."""
    assert splits.balanced_split(128, 256, 8, 108, 1) == (5, 52)
    # A cost of each part makes parts fewer.
    assert splits.balanced_split(120, 48, 32, 108, 1) == (6, 8)
    assert splits.balanced_split(120, 48, 32, 108, 3) == (4, 12)
    for num_programs, num_blocks, most in itertools.product((1, 8, 100, 512), (1, 7, 64), (1, 32)):
        num_splits, blocks = splits.balanced_split(num_programs, num_blocks, most, 132, 3)
        assert 1 <= num_splits <= most
        # All blocks of columns, and no split without any.
        assert (num_splits - 1) * blocks < num_blocks <= num_splits * blocks


def test_shipped_tiles_fit_the_rows() -> None:
    for capability, dtype in itertools.product(
        (80, 86, 89, 90, 100), (torch.float16, torch.float32)
    ):
        for width in range(1, MAX_WIDTH + 1):
            padded_width = pair_sums.padded_width(width)
            assert width <= padded_width < max(33, 2 * width)
            blocks = tiles.shipped(capability, dtype, padded_width)
            assert padded_width % blocks.backward.output == 0
            for tile in (blocks.forward, blocks.backward):
                assert padded_width % tile.chunk == 0
                assert tiles.PADDED_ROWS % tile.rows == 0
                assert tiles.PADDED_ROWS % tile.columns == 0
