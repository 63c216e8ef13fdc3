"""Scores of every exit of several methods: curves over the layers, and their averages.

Figures 3 to 5 of arXiv 2602.03563 are such curves, and Table 2 is their cross-layer average.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...experiments.report_plan import Target
from ...experiments.results import Seeds, SweepResults, SweepRun, grid_label
from ...runtime.plots import legend_below, new_figure, plain, save_figure
from ..page.page import Section, Table, write_section
from .score_figures import draw_line, metric_words

# Methods that differ in these are compared on different texts.
_TEXT_OPTIONS = (
    "train_file", "max_train_samples", "max_train_samples_per_class", "max_eval_samples",
    "validation_split_percentage",
)  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """A method on a data set: layer -> scores.

    place: number of the method, which sets its colour and marker in the figures of all data sets.
    """

    label: str
    scores: Mapping[int, Seeds]
    place: int = 0

    @property
    def num_seeds(self) -> int:
        return len(next(iter(self.scores.values())))

    def average(self, layers: Sequence[int] | None = None) -> Seeds:
        """The mean over some layers, by default all, for each seed."""
        columns = [self.scores[layer].values for layer in layers or self.scores]
        by_seed = {seed: [column[seed] for column in columns] for seed in columns[0]}
        return Seeds({seed: statistics.mean(scores) for seed, scores in by_seed.items()})


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
            read = partial(SweepRun.by_layer, metric=found)
            of_seeds, problems = sweep.read(task, target.method, grid, read)
            notes += Seeds(problems=problems).missing(label, task)
            if of_seeds:
                layers = next(iter(of_seeds.values()))
                by_layer = {
                    layer: Seeds({seed: scores[layer] for seed, scores in of_seeds.items()})
                    for layer in layers
                }
                curves.append(Curve(label, by_layer, place))
                runs = sweep.of(task, target.method, grid)
                options[label] = next(run.options for run in runs if run.seed in of_seeds)
    if not curves:
        return None
    notes = [*_different_texts(options), *notes]
    return LayerScores(f"{task}, {sweep.splits(task)[0]}", found, curves, notes)


def write_layer_scores(scores: LayerScores, path: Path, title: str, text: str = "") -> Section:
    """Write `path`.png, .svg, .csv and .md; returns the section of a page that shows them."""
    curves = scores.curves
    layers = sorted({layer for curve in curves for layer in curve.scores})
    header = ["method", "seeds", *(f"layer {layer}" for layer in layers), "average"]
    rows, cells = [], []
    for curve in curves:
        columns = [*(curve.scores.get(layer, Seeds()) for layer in layers), curve.average()]
        start = [curve.label, str(curve.num_seeds)]
        rows.append([*start, *(f"{seeds.mean:.4f}" if seeds else "" for seeds in columns)])
        cells.append([*start, *(seeds.words for seeds in columns)])
    metric = metric_words(scores.metric)
    words = (
        f"{metric[0].upper()}{metric[1:]} in percent on {scores.data}, mean ± standard deviation "
        "(n - 1) over the seeds; a single seed has no deviation. Average: over the layers of a "
        "method's exits."
    )
    notes = [*_different_layers(curves), *scores.notes]
    caption = (
        f"Score of each exit on {scores.data}. Lines: mean over the seeds ({_seed_counts(curves)});"
        " band: from the lowest to the highest seed. Legend: average over the layers."
    )
    table, numbers = Table(header, cells, words), (header, rows)
    return write_section(path, title, table, draw(scores, path), caption, notes, numbers, text)


def _different_texts(options: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A warning if methods (label -> options) were trained, or scored, on different texts."""
    found = []
    for name in _TEXT_OPTIONS:
        values = {label: of_method.get(name) for label, of_method in options.items()}
        if len(set(values.values())) > 1:
            without = "all" if name.startswith("max") else "none"
            words = ", ".join(f"{label} {value or without}" for label, value in values.items())
            found.append(f"The methods differ in {name}, so their scores compare badly: {words}.")
    return found


def _different_layers(curves: Sequence[Curve]) -> list[str]:
    """A warning if averages are over different layers."""
    groups: dict[str, list[str]] = {}
    for curve in curves:
        groups.setdefault(", ".join(map(str, curve.scores)), []).append(curve.label)
    if len(groups) < 2:
        return []
    words = "; ".join(f"{', '.join(labels)}: layers {layers}" for layers, labels in groups.items())
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
        labels.append(f"{curve.label}, average {100 * curve.average().mean:.1f}")
        columns = [curve.scores[layer] for layer in layers]
        handles.append(draw_line(axes, curve.place, layers, columns))
    axes.set(xlabel="layer of the exit", ylabel=f"{metric_words(scores.metric)} (%)")
    most = max(curve.num_seeds for curve in scores.curves)
    spread = "" if most == 1 else f" (mean and range of up to {most} seeds)"
    axes.set_title(f"{scores.data}: score of each exit{spread}", fontsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    plain(axes)
    legend_below(figure, handles, labels, [curve.place for curve in scores.curves])
    return save_figure(figure, path)
