"""Loss curves and histograms of angles from what runs logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fusedacl.engine.reports.run_figures import (
    angle_words,
    draw_angle_histogram,
    draw_loss_curves,
    logged_angles,
)
from fusedacl.engine.runtime.text import text_table


def test_text_table() -> None:
    table = text_table(["name", "score"], [["a", "1.0"], ["longer", "10.0"]])
    assert table == "name    score\n------  -----\na         1.0\nlonger   10.0"


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
        assert pixels.shape[0] > 300 and pixels.std() > 0.02
    # Angles 61 to 80 in the first epoch, 81 to 100 in the second.
    svg = (tmp_path / "angles.svg").read_text()
    assert "epoch 1" in svg and "epoch 2" in svg
    assert "40 angles, median 80°, 25.0% beyond 90°" in svg


def test_logged_angles(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "epoch": 0.5, "angle_degrees": 80.0},
        {"step": 2, "epoch": 1, "angle_degrees exit 10": 70.0, "angle_degrees backbone": None},
        {"step": 3, "epoch": 1.5, "angle_degrees exit 10": 75.0, "loss": 1.0},
        # That of all parameters, which is compared with the scope's.
        {"step": 4, "epoch": 2, "angle_degrees_all": 60.0},
    ]
    records = [json.dumps({**line, "split": "train"}) for line in lines]
    (tmp_path / "metrics.jsonl").write_text("\n".join(records))
    assert logged_angles(tmp_path) == [
        ("model", 0.5, 80.0), ("exit 10", 1.0, 70.0), ("exit 10", 1.5, 75.0)
    ]  # fmt: skip
    assert angle_words([70.0, 90.0, 95.0], 90) == "median 90°, 33.3% beyond 90°"


def test_runs_that_cannot_be_drawn(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no metrics.jsonl"):
        draw_loss_curves({"ce": tmp_path / "absent"}, tmp_path / "curves.png")
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss_ce": 1}\n')
    with pytest.raises(ValueError, match="logged no gradient angle"):
        draw_angle_histogram(run_dir, tmp_path / "angles.png")
