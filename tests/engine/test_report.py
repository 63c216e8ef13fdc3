"""Figures that show the numbers, and a results page that claims no more than they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fusedacl.engine.report import (
    draw_angle_histogram,
    draw_loss_curves,
    results_page,
    text_table,
)


def run_results(objective: str, seed: int, accuracy: float, **changes: Any) -> dict[str, Any]:
    gate = [
        {
            "epoch": epoch,
            "steps": 10,
            "dropped_share": share,
            "angle_p10": 60.0,
            "angle_median": 75.0,
            "angle_p90": 95.0,
        }
        for epoch, share in ((1, 0.3), (2, 0.1))
    ]
    return {
        "data": "mrpc",
        "objective": objective,
        "seed": seed,
        "metrics": {"validation": {"6": {"accuracy": accuracy, "loss": 0.5}}},
        "gate": gate if objective == "acl" else [],
        "train_samples_per_second": 50.0,
        "options": {"objective": objective, "seed": seed, "temperature": 0.5},
        "command": f"fusedacl train --objective {objective} --seed {seed}",
        **changes,
    }


def page_of(tmp_path: Path, *runs: dict[str, Any]) -> str:
    files = []
    for index, run in enumerate(runs):
        files.append(tmp_path / f"{index}.json")
        files[-1].write_text(json.dumps(run))
    return results_page(files)


def test_a_clear_win_is_said_and_marked(tmp_path: Path) -> None:
    runs = [run_results("ce", seed, 0.80 + 0.002 * seed) for seed in (1, 2, 3)]
    runs += [run_results("acl", seed, 0.85 + 0.002 * seed) for seed in (1, 2, 3)]
    page = page_of(tmp_path, *runs)
    assert "| CE | 3 | 80.4 ± 0.2 | 0.500 | - |" in page
    assert "| ACL | 3 | **85.4 ± 0.2** | 0.500 | 20.0% |" in page
    assert "ACL - CE = +5.0 points, more than the deviation (0.2): ACL wins." in page
    assert "| 1 | 30 | 30.0% | 75 | 60 to 95 |" in page
    assert page.count("fusedacl train --objective") == 6


def test_a_loss_and_a_draw_are_said_as_plainly(tmp_path: Path) -> None:
    ce = [run_results("ce", seed, 0.80 + 0.02 * seed) for seed in (1, 2)]
    worse = [run_results("acl", seed, 0.70 + 0.02 * seed) for seed in (1, 2)]
    page = page_of(tmp_path, *ce, *worse)
    assert "ACL loses" in page
    equal = [run_results("acl", seed, 0.81 + 0.02 * seed) for seed in (1, 2)]
    page = page_of(tmp_path, *ce, *equal)
    assert "ACL - CE = +1.0 points, within the deviation (1.4): ACL does not win" in page
    assert "**" not in page


def test_runs_with_other_settings_are_not_averaged(tmp_path: Path) -> None:
    other = {"objective": "acl", "seed": 1, "temperature": 0.1}
    runs = [run_results("ce", 1, 0.8), run_results("acl", 1, 0.8, options=other)]
    with pytest.raises(ValueError, match="temperature=0.5 and temperature=0.1 cannot stand in one"):
        page_of(tmp_path, *runs)


def test_one_seed_claims_nothing(tmp_path: Path) -> None:
    page = page_of(tmp_path, run_results("ce", 1, 0.6), run_results("acl", 1, 0.9))
    assert "one seed: no claim" in page
    assert "**" not in page


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"metrics": {}}'])
def test_not_a_results_file(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=r"x.json' is not the results.json of a run"):
        results_page([tmp_path / "x.json"])
    with pytest.raises(ValueError, match="No results files"):
        results_page([])


def test_text_table() -> None:
    table = text_table(["name", "score"], [["a", "1.0"], ["longer", "10.0"]])
    assert table.splitlines() == [
        "name    score",
        "------  -----",
        "a         1.0",
        "longer   10.0",
    ]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    directory.mkdir()
    records: list[dict[str, Any]] = [
        {"step": n, "epoch": n / 20, "split": "train", "loss_ce": 1 / n, "angle_degrees": 60.0 + n}
        for n in range(1, 41)
    ]
    metrics = {"accuracy": 0.5, "loss": 0.7}
    records.append({"step": 40, "epoch": 2, "split": "validation", "exit": 6, "metrics": metrics})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return directory


def test_figures_are_drawn(run_dir: Path, tmp_path: Path) -> None:
    import matplotlib.image

    curves = draw_loss_curves({"ce": run_dir, "acl": run_dir}, tmp_path / "curves.png")
    angles = draw_angle_histogram(run_dir, tmp_path / "angles.png")
    for figure in (curves, angles):
        pixels = matplotlib.image.imread(figure)
        assert pixels.shape[0] > 300
        assert pixels.std() > 0.02


def test_runs_that_cannot_be_drawn(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no metrics.jsonl"):
        draw_loss_curves({"ce": tmp_path / "absent"}, tmp_path / "curves.png")
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss_ce": 1}\n')
    with pytest.raises(ValueError, match="logged no gradient angle"):
        draw_angle_histogram(run_dir, tmp_path / "angles.png")
