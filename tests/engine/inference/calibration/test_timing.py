"""Tables, the quality-speed figure, and times of early exit beside the full model."""

from __future__ import annotations

import csv
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fusedacl.engine import MultiExitConfig, MultiExitForSequenceClassification
from fusedacl.engine.inference.calibration.figures import draw_quality_speed, write_speed_tables
from fusedacl.engine.inference.calibration.search import SweepRow
from fusedacl.engine.inference.calibration.timing import MeasuredSpeed, measure_speed
from fusedacl.engine.model.early_exit import EarlyExit
from fusedacl.engine.model.exit_policies import Entropy, FixedLayer, Patience
from fusedacl.engine.runtime.machine import machine_name
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tiny_runs import random_texts
from transformers import BertConfig, BertModel, RobertaConfig

ROWS = [
    SweepRow(Entropy(0.25), 0.75, 2.5, 0.42),
    SweepRow(Entropy(0.125), 0.8125, 3.25, 0.8),
    SweepRow(Patience(1), 0.8, 2.0, 0.5),
    SweepRow(FixedLayer(1), 0.6, 1.0, 0.25),
]
SIZES = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2, "vocab_size": 60}
CURVES = {"entropy": ROWS[:2], "patience": ROWS[2:3], "fixed_layer": ROWS[3:]}
AREAS = {"entropy": 0.75125, "patience": 0.7, "fixed_layer": 0.61}
MEASURED = {
    ROWS[0].policy: [MeasuredSpeed(1, 100, 5, 2.0, 5.0, 2.5)],
    ROWS[2].policy: [MeasuredSpeed(32, 100, 5, 1.0, 2.0, 2.0)],
}


def test_tables(tmp_path: Path) -> None:
    path = tmp_path / "exits"
    csv_file, markdown_file = write_speed_tables(CURVES, AREAS, "accuracy", path, MEASURED)
    with csv_file.open(newline="") as file:
        table = list(csv.DictReader(file))
    assert table[0]["policy"] == "entropy"
    assert table[0]["parameters"] == "threshold=0.25"
    assert table[0]["accuracy"] == "0.7500"
    assert table[0]["speedup_batch_1"] == "2.50"
    assert table[0]["speedup_batch_32"] == table[1]["speedup_batch_1"] == ""
    areas = [row["area_under_curve"] for row in table]
    assert areas == ["0.7512", "0.7512", "0.7000", "0.6100"]
    lines = markdown_file.read_text().splitlines()
    assert lines[0] == "| policy | area under the curve |"
    assert lines[3] == "| patience | 0.7000 |"
    lines = lines[-2 - len(ROWS) :]
    assert lines[0].startswith("| policy | parameters | accuracy | mean_layer | flops_share | ms_")
    assert lines[4].startswith("| patience | patience=1 | 0.8000 | 2.000 | 0.5000 |")


def test_figure(tmp_path: Path) -> None:
    png, svg = draw_quality_speed(CURVES, 0.82, "accuracy", tmp_path / "v1.5")
    assert (png.name, svg.name) == ("v1.5.png", "v1.5.svg")
    assert png.stat().st_size > 10_000
    assert "<svg" in svg.read_text()
    with pytest.raises(ValueError, match="curves is empty"):
        draw_quality_speed({"entropy": []}, 0.8, "accuracy", tmp_path / "none")


def test_times_are_panels_of_the_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A panel per batch size, with the settings timed at it and the full model."""
    drawn = []
    savefig = Figure.savefig

    def kept(self: Figure, *arguments: Any, **options: Any) -> None:
        drawn.append(self)
        savefig(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", kept)
    draw_quality_speed(CURVES, 0.82, "accuracy", tmp_path / "plain")
    assert len(drawn[0].axes) == 1
    draw_quality_speed(CURVES, 0.82, "accuracy", tmp_path / "timed", MEASURED)
    operations, one_by_one, batches = drawn[-1].axes
    assert points(operations)["entropy"] == [(0.42, 0.75), (0.8, 0.8125)]
    assert points(one_by_one)["entropy"] == [(2.5, 0.75)] and points(batches)["entropy"] == []
    assert points(batches)["patience"] == [(2.0, 0.8)]
    assert points(one_by_one)["full model"] == [(1, 0.82)]
    assert "measured speed, batch 32" in batches.get_xlabel()


def points(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """The points of each line."""
    return {
        str(line.get_label()): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for line in axes.get_lines()
    }


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="need matplotlib"):
        draw_quality_speed({"entropy": ROWS[:2]}, 0.8, "accuracy", tmp_path / "figure")


TEXTS = random_texts(20, 24)
MEASURING: dict[str, Any] = {"batch_size": 4, "pad_token_id": 0, "max_texts": 8, "repeats": 3}


@pytest.fixture
def two_exit_model() -> MultiExitForSequenceClassification:
    backbone = BertConfig(**SIZES, intermediate_size=64)
    config = MultiExitConfig(backbone, exit_layers=[1, 6], exit_head="linear")
    return MultiExitForSequenceClassification(config)


def test_times(two_exit_model: MultiExitForSequenceClassification) -> None:
    # Medians of many passes: a busy machine holds up some.
    measuring = {**MEASURING, "repeats": 15}
    (speed,) = measure_speed(two_exit_model, TEXTS, [FixedLayer(1)], **measuring)
    assert (speed.batch_size, speed.num_texts, speed.repeats) == (4, 8, 15)
    # A layer of six is faster on any machine.
    assert speed.speedup > 1
    assert 0 < speed.early_ms < speed.full_ms


def test_all_take_turns(
    two_exit_model: MultiExitForSequenceClassification, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings and the full model alternate batch by batch, in rotating order."""
    turns, clock = [], [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    call, forward = EarlyExit.__call__, BertModel.forward

    def early(self: EarlyExit, *arguments: Any, **inputs: Any) -> Any:
        turns.append(str(self.policy.parameters["layer"]))
        clock[0] += 2 if turns[-1] == "1" else 5
        return call(self, *arguments, **inputs)

    def full(self: BertModel, *arguments: Any, **inputs: Any) -> Any:
        turns.append("full")
        clock[0] += 10
        return forward(self, *arguments, **inputs)

    monkeypatch.setattr(EarlyExit, "__call__", early)
    monkeypatch.setattr(BertModel, "forward", full)
    speeds = measure_speed(two_exit_model, TEXTS, [FixedLayer(1), FixedLayer(6)], **MEASURING)
    warm, rounds = turns[:3], turns[3:]
    assert warm == ["full", "1", "6"]
    # Three passes of two batches.
    first, second, third = ["full", "1", "6"], ["1", "6", "full"], ["6", "full", "1"]
    assert rounds == [*first, *second, *second, *third, *third, *first]
    found = [(speed.early_ms, speed.full_ms, speed.speedup) for speed in speeds]
    assert found == [(500, 2500, 5), (1250, 2500, 2)]


def test_token_types_that_the_encoder_does_not_take() -> None:
    """Those of pairs from a BERT tokenizer, given to a RoBERTa with one type."""
    backbone = RobertaConfig(**SIZES, intermediate_size=64, type_vocab_size=1, pad_token_id=0)
    config = MultiExitConfig(backbone, exit_layers=[1, 6], exit_head="linear")
    pairs = replace(TEXTS, token_types=np.ones(len(TEXTS.tokens), dtype=np.int8))
    model = MultiExitForSequenceClassification(config)
    (speed,) = measure_speed(model, pairs, [FixedLayer(1)], **MEASURING)
    assert speed.full_ms > 0


def test_layers_above_the_last_exit_are_not_timed() -> None:
    backbone = BertConfig(**SIZES, intermediate_size=64)
    config = MultiExitConfig(backbone, exit_layers=[2, 4], exit_head="linear")
    model = MultiExitForSequenceClassification(config)
    ran: Counter[int] = Counter()
    for number, layer in enumerate(model.backbone.encoder.layer, start=1):
        layer.register_forward_hook(lambda *_, number=number: ran.update([number]))
    measure_speed(model, TEXTS, [FixedLayer(2)], **MEASURING)
    # Early exit and the full model share the first two layers: a warm call and six batches each.
    assert ran == {1: 14, 2: 14, 3: 7, 4: 7}


def test_the_machine_is_named() -> None:
    name = machine_name(torch.device("cpu"))
    assert name.endswith(f", {torch.get_num_threads()} thread") and len(name) > 12
