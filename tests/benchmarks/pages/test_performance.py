"""The generated pages: slower providers are shown too, and the committed pages are current."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from bench_results import case, rates, result, times
from fusedacl.benchmarks.measuring.environment import environment
from fusedacl.benchmarks.pages import performance, roofline
from fusedacl.benchmarks.pages.headline import BEGIN, END
from fusedacl.benchmarks.pages.performance import modelled, page, read_directories
from fusedacl.benchmarks.suites.growth import fits


def entry(p50: float, peak: int | None = 2**20) -> dict[str, Any]:
    return times(p50, peak_bytes=peak, error=1e-7, formula="f", ours=False, over_floor=p50)


def bench_case(words: str, shape: dict[str, Any], **providers: float) -> dict[str, Any]:
    return case(
        words, {name.replace("_", "-"): entry(p50) for name, p50 in providers.items()},
        case={"dtype": "float32", **shape}, floor_ms=1.0, bound_by="exp",
        left_out={"inf-cl": "inf-cl runs on NVIDIA GPUs only: --device cuda"},
        rates=rates(100.0, 2.0, None),
    )  # fmt: skip


SUPCON = {"loss": "supcon", "samples": 4096, "width": 64, "classes": 16, "exits": 1}


def bench_file(directory: Path, benchmark: str, cases: list[dict[str, Any]], **more: Any) -> None:
    found = result(
        *cases, benchmark=benchmark, environment=environment(), rates=rates(200.0, 3.0, 10.0),
        noise={"spread": 0.2, "noisy": True, "why": ["times scatter by 20%"]}, **more,
    )  # fmt: skip
    directory.mkdir(exist_ok=True)
    (directory / f"{benchmark}.json").write_text(json.dumps(found))


def bench_directory(directory: Path) -> Path:
    large = bench_case("supcon_loss M=4096 d=64 float32", SUPCON, fusedacl=40.0, dense=30.0,
                       pytorch_metric_learning=400.0)  # fmt: skip
    bench_file(directory, "loss", [large])
    task = {"task": "dot_norm", "parameters": 1000}
    sums = bench_case("dot_norm of 199 tensors", task, fusedacl=2.0)
    sums["providers"]["concatenate + dot + norms"] = entry(20.0, peak=None)
    bench_file(directory, "angle", [sums])
    points = [
        bench_case(f"supcon_loss M={size}", SUPCON | {"samples": size}, fusedacl=size**1.5,
                   dense=size**2) | {"axis": "M", "size": size}
        for size in (64, 128, 256)
    ]  # fmt: skip
    points[-1]["left_out"] = {"SupContrast": "does not fit: about 9 GiB by prediction"}
    bench_file(directory, "growth", points, growth=fits(points))
    return directory


def test_cases_with_slower_and_faster_providers(tmp_path: Path) -> None:
    directory = bench_directory(tmp_path / "some-machine")
    text = page(read_directories([directory]), tmp_path / "docs")
    assert "supcon_loss M=4096 d=64 float32 (floor 1.00 ms, bound by exp):" in text
    assert "| fusedacl | 40.0 (36.0 to 44.0) | - | 40.00 | 1.0 |" in text
    assert "| dense | 30.0 (27.0 to 33.0) | 0.75 | 30.00 | 1.0 |" in text
    assert "| pytorch-metric-learning | 400 (360 to 440) | 10.00 | 400.00 | 1.0 |" in text
    assert "| concatenate + dot + norms | 20.0 (18.0 to 22.0) | 10.00 | 20.00 | - |" in text
    assert "- inf-cl: inf-cl runs on NVIDIA GPUs only: --device cuda.\n" in text
    assert "**Noisy**: times scatter by 20%." in text
    assert "| M | fusedacl | 1.50 | 0.00 | 256 |" in text
    assert "- SupContrast: does not fit: about 9 GiB by prediction." in text
    assert "![Roofline of some-machine](../some-machine/roofline.png)" in text
    opening, _, _ = text.partition("## Machine")
    assert "Nothing here was measured on a GPU." in opening
    assert "- Contrastive loss, forward + backward, M=4096 d=64 float32: 40 ms" in opening
    # The alternative that is faster than ours is named.
    assert "the fastest alternative with the same result (dense) 0.75 times" in opening
    assert "fusedacl: time M^1.50, memory M^0.00; dense: time M^2.00" in opening
    assert "*floor*" in opening and "*Peak memory*" in opening


def test_the_command_draws_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = bench_directory(tmp_path / "some-machine")
    readme = tmp_path / "README.md"
    readme.write_text(f"Before.\n\n{BEGIN}\nold\n{END}\n\nAfter.\n")
    output = tmp_path / "docs" / "performance.md"
    output.parent.mkdir()
    words = [str(directory), "--output", str(output), "--readme", str(readme)]
    monkeypatch.setattr(sys, "argv", ["report", *words])
    assert performance.main() == 0
    for name in ("roofline.png", "growth.png"):
        assert (directory / name).stat().st_size > 5_000
    assert "](../some-machine/growth.png)" in output.read_text()
    text = readme.read_text()
    assert text.startswith("Before.\n\n") and text.endswith("\n\nAfter.\n") and "old" not in text
    assert (
        "| contrastive loss, forward + backward, M=4096 d=64 float32 | pytorch-metric-learning "
        "| 40 ms | 400 ms | 10.00 times | 1.0 against 1.0 MiB | dense: 0.75 times | some-machine |"
        in text
    )
    # A second run changes nothing, nor does a later machine with fewer comparisons.
    later = tmp_path / "later-machine"
    later.mkdir()
    (later / "loss.json").write_bytes((directory / "loss.json").read_bytes())
    monkeypatch.setattr(sys, "argv", ["report", str(later), *words])
    assert performance.main() == 0
    assert readme.read_text() == text
    readme.write_text("No markers.\n")
    assert performance.main() == 2
    assert "needs the markers" in capsys.readouterr().err


def test_the_committed_pages_and_figures_are_current(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    docs = root / "docs"
    directories = sorted((root / "benchmarks" / "results").iterdir())
    results = read_directories(directories)
    assert page(results, docs) == (docs / "performance.md").read_text()
    assert modelled(results, docs) == (docs / "scaling_by_the_model.md").read_text()
    performance.draw({tmp_path / path.name: found for path, found in results.items()})
    for directory in directories:
        drawn = {file.name for file in (tmp_path / directory.name).iterdir()}
        assert drawn == {file.name for file in directory.iterdir() if file.suffix != ".json"}


@pytest.mark.parametrize("num_points", [1, 2])
def test_an_interrupted_series_without_peaks_is_drawn(num_points: int, tmp_path: Path) -> None:
    directory = bench_directory(tmp_path / "some-machine")
    result = json.loads((directory / "growth.json").read_text())
    points = result["cases"][:num_points]
    for point in points:
        for measured in point["providers"].values():
            measured["peak_bytes"] = None
    bench_file(directory, "growth", points, growth=fits(points))
    words = ["report", str(directory), "--output", str(tmp_path / "performance.md")]
    assert performance.main(words[1:]) == 0
    assert (directory / "growth.png").exists()


def test_a_point_is_where_its_operations_put_it() -> None:
    """M = 4096, d = 64, float32: 4 M^2 d operations, M d (3 x 4 + 4) bytes."""
    found = bench_case("c", SUPCON, fusedacl=1000.0)
    (point,) = roofline.points({"cases": [found]})
    assert point["intensity"] == pytest.approx(4 * 4096**2 * 64 / (4096 * 64 * 16))
    assert point["per_second"] == pytest.approx(4 * 4096**2 * 64)
    cases = [found, found | {"rates": rates(50.0, 4.0, 9.0)}]
    limits = roofline.roofs([{"rates": None, "cases": cases}])
    assert limits == {"flops": 100e9, "exponentials": 4e9, "bytes": 9e9, "overlaps": False}
    roof, words = roofline.exponential_roof(limits, 64)
    assert roof == pytest.approx(1 / (1 / 100e9 + 1 / (4 * 64 * 4e9))) and "products" in words
    assert roofline.exponential_roof(limits | {"overlaps": True}, 64) == (4 * 64 * 4e9, "exp")
