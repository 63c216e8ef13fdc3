"""Parts that all figures share: colours visible on both pages, and names that a page can find."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from fusedacl.engine.experiments.results import Seeds
from fusedacl.engine.reports.page import page
from fusedacl.engine.reports.sections.score_figures import draw_dots, draw_values, metric_words
from fusedacl.engine.runtime.plots import COLORS, MARKERS, legend_below, look, new_figure


def luminance(color: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(*colors: str) -> float:
    dark, light = sorted(map(luminance, colors))
    return (light + 0.05) / (dark + 0.05)


def test_looks_differ_and_have_contrast_on_the_light_and_the_dark_page() -> None:
    style = Path(page.__file__).with_name("page.css").read_text(encoding="utf-8")
    themes = [dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in style.split("@media")[:2]]
    assert len(themes) == 2
    inks, papers = ("ink", "soft", "accent", "strong"), ("page", "card", "shade")
    for theme in themes:
        for color in COLORS:
            assert contrast(color, theme["card"]) >= 3, (color, theme["card"])
        for ink, paper in itertools.product(inks, papers):
            assert contrast(theme[ink], theme[paper]) >= 4.5, (ink, paper)
    assert len(COLORS) == len(MARKERS) == len(set(COLORS)) == len(set(MARKERS))
    assert look(1) == look(1 + len(COLORS)) != look(0)


@pytest.mark.parametrize("labels", [["a"] * 30, ["CE+SCL, aux_weight 0.02"] * 5, ["W" * 24] * 3])
@pytest.mark.parametrize("width", [4.0, 7.2, 12.0])
def test_a_legend_fits_into_its_figure(labels: list[str], width: float) -> None:
    figure = new_figure(width, 4)
    lines = [figure.subplots().plot([0, 1], label=label)[0] for label in labels]
    legend_below(figure, lines, labels)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    extent = legend.get_window_extent()
    assert extent.x0 >= 0 and extent.x1 <= figure.bbox.width
    assert len(legend.get_texts()) == len(labels)


def test_every_part_has_a_name_of_its_own(tmp_path: Path) -> None:
    seeds = Seeds({1: 0.5, 2: 0.6}, {})
    lines = {"a": [(0.1, seeds), (0.5, seeds)], "b": [(0.1, seeds), (0.9, Seeds({}, {1: "x"}))]}
    files = draw_values({"mrpc": lines, "rte": {"b": lines["b"]}}, "weight", "%", tmp_path / "v.1")
    assert [file.name for file in files] == ["v.1.png", "v.1.svg"]
    svg = files[1].read_text()
    names = re.findall(r'id="((?:series|legend)-[^"]*)"', svg)
    assert len(set(names)) == len(names)
    assert {"series-0-0", "series-1-0", "series-1-2", "legend-0", "legend-1-text"} <= set(names)
    assert all(f">{value}</text>" in svg for value in (0.1, 0.5, 0.9))


def test_dots_of_a_missing_row(tmp_path: Path) -> None:
    seeds = Seeds({1: 0.5}, {})
    rows = {f"task {n}": [("a", seeds), ("b", Seeds({}, {1: "waiting"}))] for n in range(4)}
    png, svg = draw_dots(rows, "Score (%)", tmp_path / "dots")
    assert png.stat().st_size > 5000
    text = svg.read_text()
    # The second row begins with the fourth panel, and has the labels again.
    assert (text.count(">missing<"), text.count(">a</text>")) == (4, 2)


def test_metric_words() -> None:
    names = ("f1", "matthews_correlation", "top_5")
    assert [*map(metric_words, names)] == ["F1", "Matthews correlation", "top 5"]
