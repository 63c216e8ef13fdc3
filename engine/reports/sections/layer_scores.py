"""Scores of every exit of several methods: curves over the layers, and their averages.

Figures 3 to 5 of arXiv 2602.03563 are such curves, and Table 2 is their cross-layer average.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...experiments.report_plan import Target
from ...experiments.results import (
    NotThereError,
    SweepResults,
    grid_label,
    mean_and_deviation,
    missing_notes,
)
from ...runtime.plots import legend_below, new_figure, plain, save_figure
from ..page.page import Section, Table, write_section
from .score_figures import draw_line, mean_of, metric_words

# Methods that differ in these are compared on different texts.
_TEXT_OPTIONS = ("max_train_samples", "max_eval_samples")


@dataclass(frozen=True)
class Curve:
    """A method on a data set: layer -> the scores of its seeds, as fractions.

    place: number of the method, which sets its colour and marker in the figures of all data sets.
    """

    label: str
    scores: Mapping[int, Sequence[float]]
    place: int = 0

    @property
    def num_seeds(self) -> int:
        return len(next(iter(self.scores.values())))

    @property
    def averages(self) -> list[float]:
        """The mean over the layers for each seed."""
        return [statistics.mean(of_seed) for of_seed in zip(*self.scores.values(), strict=True)]


@dataclass(frozen=True)
class LayerScores:
    """The curves of a data set ("mrpc, validation"); notes: what is missing, and why."""

    data: str
    metric: str
    curves: Sequence[Curve]
    notes: Sequence[str]


def sweep_curves(
    sweep: SweepResults, task: str, targets: Mapping[str, Target], metric: str | None = None
) -> LayerScores | None:
    """The curves of some methods (printed name -> method) on a task; None if no run is done.

    Raises:
        ValueError: the runs do not report `metric`.
    """
    found = sweep.metric(task, metric)
    if found is None:
        return None
    curves, notes = [], []
    options: dict[str, Mapping[str, Any]] = {}
    place = -1
    for name, target in targets.items():
        if not any(run.task == task for run in sweep.runs if run.method == target.method):
            place += len(sweep.grids(target.method))
            notes.append(f"{name} is not among the runs of {task}.")
            continue
        for grid in sweep.grids(target.method):
            place += 1
            label = grid_label(name, grid)
            by_layer: dict[int, list[float]] = {}
            problems: dict[int, str] = {}
            for run in sweep.of(task, target.method, grid):
                try:
                    scores = {layer: run.score(found, layer) for layer in run.layers()}
                except NotThereError as error:
                    problems[run.seed] = str(error)
                    continue
                options.setdefault(label, run.options)
                for layer, score in scores.items():
                    by_layer.setdefault(layer, []).append(score)
            notes += missing_notes(label, task, problems)
            if by_layer:
                curves.append(Curve(label, by_layer, place))
    if not curves:
        return None
    notes = [*_different_texts(options), *notes]
    return LayerScores(f"{task}, {sweep.splits(task)[0]}", found, curves, notes)


def write_layer_scores(scores: LayerScores, path: Path, title: str) -> Section:
    """Write `path`.png, .svg, .csv and .md; returns the section of a page that shows them."""
    curves = scores.curves
    layers = sorted({layer for curve in curves for layer in curve.scores})
    header = ["method", "seeds", *(f"layer {layer}" for layer in layers), "average"]
    rows, cells = [], []
    for curve in curves:
        values = [curve.scores.get(layer, ()) for layer in layers]
        columns = [*values, curve.averages]
        means = [f"{statistics.mean(column):.4f}" if column else "" for column in columns]
        rows.append([curve.label, str(curve.num_seeds), *means])
        cells.append([curve.label, str(curve.num_seeds), *map(mean_and_deviation, columns)])
    metric = metric_words(scores.metric)
    metric = metric[0].upper() + metric[1:]
    words = (
        f"{metric} in percent on {scores.data}, mean ± standard deviation (n - 1) over the "
        "seeds; a single seed has no deviation. Average: over the layers of a method's exits."
    )
    notes = [*_different_layers(curves), *scores.notes]
    caption = (
        f"Score of each exit on {scores.data}. Lines: mean over the seeds ({_seed_counts(curves)});"
        " band: from the lowest to the highest seed. Legend: average over the layers."
    )
    table = Table(header, cells, words)
    return write_section(path, title, table, draw(scores, path), caption, notes, (header, rows))


def _different_texts(options: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A warning if methods (label -> options) were trained, or scored, on different texts."""
    found = []
    for name in _TEXT_OPTIONS:
        values = {label: of_method.get(name) for label, of_method in options.items()}
        if len(set(values.values())) > 1:
            words = ", ".join(f"{label} {value or 'all'}" for label, value in values.items())
            found.append(f"The methods differ in {name}, so their scores compare badly: {words}.")
    return found


def _different_layers(curves: Sequence[Curve]) -> list[str]:
    """A warning if averages are over different layers."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for curve in curves:
        groups.setdefault(tuple(curve.scores), []).append(curve.label)
    if len(groups) < 2:
        return []
    words = "; ".join(
        f"{', '.join(labels)}: layers {', '.join(map(str, layers))}"
        for layers, labels in groups.items()
    )
    return [f"The averages are over different layers and cannot be compared: {words}."]


def _seed_counts(curves: Sequence[Curve]) -> str:
    counts = dict.fromkeys(curve.num_seeds for curve in curves)
    if len(counts) == 1:
        number = next(iter(counts))
        return f"{number} each" if number > 1 else "one: there is no band"
    return ", ".join(f"{curve.label} {curve.num_seeds}" for curve in curves)


def draw(scores: LayerScores, path: Path) -> list[Path]:
    """A line per method with the mean and the range of its seeds: `path`.png and .svg."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(7.5, 4.9)
    axes = figure.subplots()
    handles, labels = [], []
    for curve in scores.curves:
        layers = sorted(curve.scores)
        columns = [curve.scores[layer] for layer in layers]
        labels.append(f"{curve.label}, average {mean_of(curve.averages):.1f}")
        handles.append(draw_line(axes, curve.place, layers, columns))
    axes.set_xlabel("layer of the exit")
    axes.set_ylabel(f"{metric_words(scores.metric)} (%)")
    axes.set_title(f"{scores.data}: score of each exit" + _seeds(scores.curves), fontsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    plain(axes)
    legend_below(figure, handles, labels, [curve.place for curve in scores.curves])
    return save_figure(figure, path)


def _seeds(curves: Sequence[Curve]) -> str:
    most = max(curve.num_seeds for curve in curves)
    return "" if most == 1 else f" (mean and range of up to {most} seeds)"
