"""Scores of every exit of several runs, side by side: curves over the layers and their averages.

Figures 3 to 5 of arXiv 2602.03563 are such curves, and Table 2 is their cross-layer average.
"""

from __future__ import annotations

import math
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
from ...experiments.runs import main_split, read_results, run_label, scored_layers
from ...runtime.plots import legend_below, look, mark, new_figure, plain, save_figure
from ...runtime.text import did_you_mean, write_tables
from ..page.page import Figure, Section, Table
from .score_figures import mean_of, metric_words

# What seeds of one experiment may differ in: a first stage and a cache belong to one seed.
_FREE_OPTIONS = ("seed", "stage1_model", "feature_cache")
# With others of these, methods are compared on other texts.
_TEXT_OPTIONS = ("max_train_samples", "max_eval_samples")


@dataclass(frozen=True)
class Curve:
    """One method on one data set: layer -> the scores of its seeds, as fractions."""

    label: str
    scores: Mapping[int, Sequence[float]]
    # Which of the methods it is, so that it looks alike in the figures of all data sets.
    place: int = 0

    @property
    def num_seeds(self) -> int:
        return len(next(iter(self.scores.values())))

    @property
    def averages(self) -> list[float]:
        """The mean over the layers, of each seed."""
        return [statistics.mean(of_seed) for of_seed in zip(*self.scores.values(), strict=True)]


@dataclass(frozen=True)
class LayerScores:
    """The curves of one data set ("mrpc, validation"); notes: what was left out, and why."""

    data: str
    metric: str
    curves: Sequence[Curve]
    notes: Sequence[str]


def read_curves(runs: Sequence[Path], metric: str | None = None) -> LayerScores:
    """The curves of some runs; runs that differ in the seed only are one.

    A run with a score that is not a finite number is left out and named in the notes.

    Args:
        metric: None: the first that the runs report.

    Raises:
        ValueError: a directory without results, runs on different data, exits on different layers,
            a seed that is there twice, no run with finite scores, or an unknown metric.
    """
    if not runs:
        raise ValueError("runs is empty: name the directories of some runs.")
    found = [read_results(run) for run in runs]
    data = {f"{results['data']}, {main_split(results)}" for results in found}
    if len(data) > 1:
        raise ValueError(
            f"runs on different data cannot share a figure: {'; '.join(sorted(data))}. Make one "
            "report for each."
        )
    by_layer = scored_layers(found[0])
    names = [name for name in next(iter(by_layer.values())) if name != "loss"]
    metric = names[0] if metric is None else metric
    if metric not in names:
        raise ValueError(
            f"metric={metric!r} is not among the runs' metrics.{did_you_mean(metric, names)}"
        )
    scores: dict[str, dict[int, list[float]]] = {}
    options: dict[str, dict[str, Any]] = {}
    of_seed: dict[tuple[str, Any], Path] = {}
    notes = []
    for run, results in zip(runs, found, strict=True):
        label = run_label(results["options"])
        curve = scores.setdefault(label, {layer: [] for layer in scored_layers(results)})
        if list(curve) != list(scored_layers(results)):
            raise ValueError(
                f"{str(run)!r} ({label}) has exits on layers {list(scored_layers(results))}, "
                f"another run of that kind on {list(curve)}: they are not seeds of one "
                "experiment."
            )
        seed = results["options"].get("seed")
        other = of_seed.get((label, seed))
        of_seed[label, seed] = run
        if seed is not None and other is not None:
            raise ValueError(
                f"{str(other)!r} and {str(run)!r} ({label}) have the same seed, {seed}, and would "
                "count as two: name one of them."
            )
        first = options.setdefault(label, results["options"])
        differing = [
            f"{name} {first[name]!r} and {value!r}"
            for name, value in results["options"].items()
            if name not in _FREE_OPTIONS and name in first and first[name] != value
        ]
        if differing:
            raise ValueError(
                f"{str(run)!r} ({label}) is no seed of the same experiment as another run of that "
                f"kind: {', '.join(differing)}."
            )
        values: dict[int, Any] = {
            layer: metrics.get(metric) for layer, metrics in scored_layers(results).items()
        }
        bad = [f"{value} at layer {layer}" for layer, value in values.items() if not _finite(value)]
        if bad:
            notes.append(f"Left out: {str(run)!r} ({label}), whose {metric} is {', '.join(bad)}.")
            continue
        for layer, value in values.items():
            curve[layer].append(value)
    curves = [
        Curve(label, curve, place)
        for place, (label, curve) in enumerate(scores.items())
        if all(curve.values())
    ]
    if not curves:
        raise ValueError(f"no run has finite scores. {' '.join(notes)}")
    shown = {curve.label: options[curve.label] for curve in curves}
    return LayerScores(next(iter(data)), metric, curves, [*_other_texts(shown), *notes])


def _other_texts(options: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A warning where methods were not trained, or not scored, on the same texts."""
    found = []
    for name in _TEXT_OPTIONS:
        values = {label: of_method.get(name) for label, of_method in options.items()}
        if len(set(values.values())) > 1:
            words = ", ".join(f"{label} {value or 'all'}" for label, value in values.items())
            found.append(f"The methods differ in {name}, so their scores compare badly: {words}.")
    return found


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def sweep_curves(
    sweep: SweepResults, task: str, targets: Mapping[str, Target], metric: str | None = None
) -> LayerScores | None:
    """The curves of a sweep's methods on a task; None where no run of theirs is done.

    Raises:
        ValueError: the runs do not report `metric`.
    """
    found = sweep.metric(task, metric)
    if found is None:
        return None
    curves, notes = [], []
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
                for layer, score in scores.items():
                    by_layer.setdefault(layer, []).append(score)
            notes += missing_notes(label, task, problems)
            if by_layer:
                curves.append(Curve(label, by_layer, place))
    if not curves:
        return None
    return LayerScores(f"{task}, {sweep.splits(task)[0]}", found, curves, notes)


def write_layer_scores(scores: LayerScores, path: Path, title: str) -> Section:
    """`path`.png, .svg, .csv and .md; returns them as a page's section."""
    figures = draw(scores, path)
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
    tables = write_tables(path, header, cells, "\n\n".join([words, *notes]), (header, rows))
    caption = (
        f"Score of each exit on {scores.data}. Lines: mean over the seeds ({_seed_counts(curves)});"
        " band: from the lowest to the highest seed. Legend: average over the layers."
    )
    return Section(
        title,
        figures=[Figure(figures[1], caption, f"{caption} The numbers are in the table below.")],
        tables=[Table(header, cells, words)],
        notes=notes,
        files=[*figures, *tables],
    )


def _different_layers(curves: Sequence[Curve]) -> list[str]:
    """A warning where averages are not over the same layers."""
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
    """One line a method, its mean over the seeds, and their range: `path`.png and .svg."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(7.5, 4.9)
    axes = figure.subplots()
    handles, labels = [], []
    for curve in scores.curves:
        index = curve.place
        layers = sorted(curve.scores)
        means = [mean_of(curve.scores[layer]) for layer in layers]
        labels.append(f"{curve.label}, average {mean_of(curve.averages):.1f}")
        (line,) = axes.plot(layers, means, **look(index), markersize=5)
        handles.append(line)
        low = [100 * min(curve.scores[layer]) for layer in layers]
        high = [100 * max(curve.scores[layer]) for layer in layers]
        band = axes.fill_between(
            layers, low, high, color=look(index)["color"], alpha=0.15, linewidth=0
        )
        mark(index, line, band)
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
