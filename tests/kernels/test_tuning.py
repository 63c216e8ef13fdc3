"""The search for tiles, and the file that keeps them for one GPU and one set of versions."""

import json
import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
from fusedacl.kernels import tuning
from fusedacl.kernels.contrastive.gpu import tiles
from fusedacl.kernels.contrastive.gpu.tiles import Tile
from fusedacl.kernels.tuning import Kernel

GPU = torch.device("cuda", 0)
SHIPPED = Tile(rows=128, columns=64, chunk=64, output=0, num_warps=4, num_stages=3)
BEST = Tile(rows=64, columns=32, chunk=64, output=0, num_warps=8, num_stages=2)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUSEDACL_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    tiles.entries.cache_clear()
    tiles.tuned.cache_clear()
    tiles.read_choices.cache_clear()
    return tmp_path / "tuning.json"


def remember(tile: Any, kernel: str = "row_sums", width: int = 64) -> None:
    name = tiles.entry_name(kernel, GPU, torch.float16, width)
    tuning.store({name: {"tile": tile}})


def distance(tile: Tile) -> float:
    """Return the number of steps to BEST, which a descending search finds."""
    halvings = sum(
        abs(math.log2(getattr(tile, name) / getattr(BEST, name)))
        for name in ("rows", "columns", "chunk", "num_warps")
    )
    return halvings + abs(tile.num_stages - BEST.num_stages)


def fake(cost: Callable[[Tile], float]) -> tuple[Kernel, tuning.Timer]:
    """Make a kernel that computes nothing, and a timer that returns the cost of its tile."""
    launched: list[Tile] = []

    def launch(tile: Tile) -> Tensor:
        launched.append(tile)
        return torch.ones(3)

    def timer(call: Callable[[], Any]) -> float:
        call()
        return cost(launched[-1])

    return Kernel("row_sums", SHIPPED, launch), timer


def test_what_was_stored_is_found(own_cache: Path) -> None:
    assert tiles.tuned("row_sums", GPU, torch.float16, 64) is None
    remember(asdict(BEST))
    assert tiles.tuned("row_sums", GPU, torch.float16, 64) == BEST
    assert tiles.tuned("row_sums", GPU, torch.float16, 128) is None
    assert tiles.tuned("row_sums", GPU, torch.float32, 64) is None
    assert tiles.tuned("pair_gradient", GPU, torch.float16, 64) is None
    assert tiles.tuned("row_sums", torch.device("cpu"), torch.float16, 64) is None
    # The file is read once.
    own_cache.unlink()
    assert tiles.tuned("row_sums", GPU, torch.float16, 64) == BEST


@pytest.mark.parametrize(
    "place, value",
    [
        ("torch.cuda.get_device_name", lambda device: "Another GPU"),
        ("triton.__version__", "99.0"),
        ("fusedacl.kernels.contrastive.gpu.tiles.version", lambda name: "99.0"),
    ],
)
def test_a_tile_is_for_one_gpu_and_for_one_version(
    place: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember(asdict(BEST))
    monkeypatch.setattr(place, value)
    assert tiles.tuned("row_sums", GPU, torch.float16, 64) is None


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "\xff",
        json.dumps({"schema": 0, "entries": {}}),
        json.dumps({"schema": tiles.SCHEMA}),
        json.dumps({"schema": tiles.SCHEMA, "entries": {"name": 3}}),
    ],
)
def test_a_damaged_file_is_ignored_with_one_warning_and_replaced_by_the_next_search(
    content: str, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own_cache.write_text(content, encoding="latin-1")
    for width in (64, 128):
        assert tiles.tuned("row_sums", GPU, torch.float16, width) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(own_cache) in record.getMessage()
    assert "Remove it" in record.getMessage()
    remember(asdict(BEST))
    assert tiles.tuned("row_sums", GPU, torch.float16, 64) == BEST


@pytest.mark.parametrize(
    "tile", [None, {"rows": 64}, {**asdict(BEST), "rows": "64"}, {**asdict(BEST), "depth": 1}]
)
def test_an_incomplete_tile_is_ignored_with_a_warning(
    tile: Any, caplog: pytest.LogCaptureFixture
) -> None:
    remember(tile)
    for _ in range(2):
        assert tiles.tuned("row_sums", GPU, torch.float16, 64) is None
    (record,) = caplog.records
    assert "its tile of row_sums does not give" in record.getMessage()


def test_writers_at_the_same_time_lose_nothing(own_cache: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda width: remember(asdict(BEST), width=width), range(16, 48)))
    assert len(json.loads(own_cache.read_text())["entries"]) == 32
    names = {path.name for path in own_cache.parent.iterdir()}
    assert names == {"tuning.json", "tuning.lock"}


def test_the_file_lies_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSEDACL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert tiles.cache_file() == Path("/caches/fusedacl/tuning.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert tiles.cache_file() == Path("/home/someone/.cache/fusedacl/tuning.json")


def test_the_search_walks_to_the_fastest_tile() -> None:
    kernel, timer = fake(lambda tile: 1 + distance(tile))
    best, times = tuning.search(kernel, 64, timer)
    assert best == BEST
    assert times[best] == 1
    assert times[SHIPPED] == 1 + distance(SHIPPED)
    # The search tries a few of the 4 x 4 x 3 x 3 x 5 possible tiles.
    assert len(times) < 50


def test_a_quick_search_tries_two_other_tiles() -> None:
    kernel, timer = fake(lambda tile: tile.num_stages / tile.rows)
    best, times = tuning.search(kernel, 64, timer, quick=True)
    assert len(times) == 3 and best == replace(SHIPPED, rows=256)
    assert replace(SHIPPED, num_stages=2) in times
    largest = replace(SHIPPED, rows=tiles.PADDED_ROWS, num_stages=1)
    found = [(tile.rows, tile.num_stages) for tile in tuning.runners_up(largest)]
    assert found == [(tiles.PADDED_ROWS, 3), (tiles.PADDED_ROWS // 2, 1)]


def test_a_gain_within_the_noise_does_not_replace_the_shipped_tile() -> None:
    kernel, timer = fake(lambda tile: 1.0 if tile == SHIPPED else 0.99)
    best, times = tuning.search(kernel, 64, timer)
    assert best == SHIPPED and len(times) > 5


def test_tiles_that_fail_or_are_wrong_are_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    kernel, timer = fake(lambda tile: 1 + distance(tile))
    launch = kernel.launch

    def unreliable(tile: Tile) -> Tensor:
        if tile.num_warps == 8:
            raise RuntimeError("out of resource: shared memory")
        result = launch(tile)
        if tile.num_stages == 2:
            result[1] = torch.nan
        return result + (0.01 if tile.rows == 64 else 0)

    best, times = tuning.search(replace(kernel, launch=unreliable), 64, timer)
    assert best == replace(SHIPPED, columns=32)
    for tile, time in times.items():
        bad = tile.num_warps == 8 or tile.num_stages == 2 or tile.rows == 64
        assert math.isinf(time) or not bad
    assert any("wrong result" in record.getMessage() for record in caplog.records)


def test_a_shipped_tile_that_does_not_run_is_an_error() -> None:
    def broken(tile: Tile) -> Tensor:
        raise RuntimeError("no kernel image")

    with pytest.raises(RuntimeError, match="no kernel image"):
        tuning.search(Kernel("row_sums", SHIPPED, broken), 64, lambda call: 1.0)


@pytest.mark.parametrize("width", [16, 768])
def test_neighbours_fit_the_padded_rows_and_width(width: int) -> None:
    found = {replace(SHIPPED, chunk=16, output=16)}
    for _ in range(4):
        found |= {neighbour for tile in found for neighbour in tuning.neighbours(tile, width)}
    for tile in found:
        assert tiles.PADDED_ROWS % tile.rows == tiles.PADDED_ROWS % tile.columns == 0
        assert width % tile.chunk == 0
        assert width % tile.output == 0 and tile.num_stages >= 1
        assert tile.num_warps in (2, 4, 8)


def test_kernels_are_launched_on_what_they_expect() -> None:
    torch.manual_seed(0)
    num_rows, width = 40, 16
    kernels = tuning.tunable_kernels(torch.device("cpu"), torch.float32, width, num_rows)
    sums, gradient = (kernel.launch(kernel.shipped) for kernel in kernels)
    torch.manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(tiles.PADDED_ROWS, width), dim=-1)[:num_rows]
    exponentials = ((z @ z.T - 1) / tuning.TEMPERATURE).exp()
    torch.testing.assert_close(sums[0], exponentials.sum(1), rtol=1e-4, atol=1e-5)
    wanted = 2 / num_rows * exponentials.fill_diagonal_(0) @ z
    torch.testing.assert_close(gradient[0], wanted, rtol=1e-3, atol=1e-4)


def test_the_command_measures_prints_and_stores(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], own_cache: Path
) -> None:
    kernel, timer = fake(lambda tile: 1 + distance(tile))
    monkeypatch.setattr(tuning, "obstacle", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tuning, "tunable_kernels", lambda *arguments: [kernel])
    monkeypatch.setattr(tuning, "gpu_timer", timer)
    compared: list[Tile | None] = []

    def compare(device: torch.device, *arguments: Any) -> dict[str, float]:
        compared.append(tiles.tuned("row_sums", device, torch.float16, 64))
        return {"supcon_fused": 2.0, "tiled": 1.0}

    monkeypatch.setattr(tuning, "time_implementations", compare)
    # Both widths are padded to 64.
    assert tuning.main(["--width", "60", "64"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3
    assert "row_sums torch.float16 width 64: rows 64, columns 32" in printed[0]
    assert printed[1].endswith("width 64: supcon_fused 2 ms, tiled 1 ms: tiled")
    assert printed[2] == f"stored in {own_cache}"
    # The implementations were compared with the tiles that had just been found.
    assert tiles.tuned("row_sums", GPU, torch.float16, 64) == BEST == compared[0]
    unknown = dict.fromkeys(tiles.PADDED_WIDTHS)
    assert dict(tiles.measured_choices(GPU, torch.float16)) == {**unknown, 64: "tiled"}
    assert dict(tiles.measured_choices(GPU, torch.float32)) == unknown
    # Launches cost more than the kernels of fewer rows.
    assert tuning.main(["--width", "128", "--rows", "2047"]) == 0
    assert dict(tiles.measured_choices(GPU, torch.float16)) == {**unknown, 64: "tiled"}


def test_a_choice_that_is_no_implementation_is_ignored_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    name = tiles.entry_name(tiles.CHOICE, GPU, torch.float16, 64)
    tuning.store({name: {"implementation": "fastest"}})
    assert dict(tiles.measured_choices(GPU, torch.float16))[64] is None
    assert "its choice for width 64 is not supcon_fused or tiled" in caplog.text


def test_implementations_are_timed_forward_and_backward() -> None:
    """On the CPU, where Triton's interpreter runs supcon_fused."""
    gradients = []

    def timer(call: Callable[[], Any]) -> float:
        gradients.append(call())
        return 1.0

    times = tuning.time_implementations(torch.device("cpu"), torch.float32, 32, 300, timer)
    assert list(times) == list(tiles.IMPLEMENTATIONS)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_the_command_refuses_where_there_is_nothing_to_measure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], own_cache: Path
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert tuning.main([]) == 2
    assert "TRITON_INTERPRET=1 is set" in capsys.readouterr().err
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tuning.main([]) == 2
    assert "cannot measure: torch finds no GPU here" in capsys.readouterr().err
    assert not own_cache.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dtype", "float61"], "did you mean 'float16'?"),
        (["--width", "2000"], "--width is 2000"),
        (["--rows", "1"], "--rows is 1"),
    ],
)
def test_wrong_arguments_are_refused_in_words(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        tuning.main(arguments)
    assert message in capsys.readouterr().err
