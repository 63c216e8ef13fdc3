"""Scores of every exit of several runs, side by side: curves over the layers and their averages.

Figures 3 to 5 of arXiv 2602.03563 are such curves, and Table 2 is their cross-layer average.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .options import did_you_mean, write_whole
from .report import OBJECTIVE_NAMES, markdown_table, require_matplotlib

# What seeds of one experiment may differ in: a first stage and a cache belong to one seed.
_FREE_OPTIONS = ("seed", "stage1_model", "feature_cache")
_STRATEGY_NAMES = {"joint": "JT", "two_stage": "2ST", "alternating": "ALT", "single": "single"}
_COLORS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


@dataclass(frozen=True)
class Curve:
    """One method on one data set: layer -> the scores of its seeds, as fractions."""

    label: str
    scores: Mapping[int, Sequence[float]]

    @property
    def num_seeds(self) -> int:
        return len(next(iter(self.scores.values())))

    @property
    def averages(self) -> list[float]:
        """The mean over the layers, of each seed."""
        return [statistics.mean(of_seed) for of_seed in zip(*self.scores.values(), strict=True)]


def run_label(options: Mapping[str, Any]) -> str:
    """What distinguishes a method, as the paper abbreviates it: "2ST-MHA ACL-CL + KD"."""
    strategy = _STRATEGY_NAMES[options["strategy"]]
    head = {"mha": "MHA", "linear": "linear"}[options["exit_head"]]
    objective = OBJECTIVE_NAMES[options["objective"]]
    if options.get("cross_layer"):
        objective += "-CL"
    if options["objective"] == "acl" and options["gate"] == "none":
        objective += " without gate"
    distilled = " + KD" if options.get("distill_weight") else ""
    return f"{strategy}-{head} {objective}{distilled}"


def read_curves(runs: Sequence[Path], metric: str | None = None) -> tuple[str, str, list[Curve]]:
    """Data set, metric and the curves of some runs; runs that differ in the seed only are one.

    Args:
        metric: None: the first that the runs report.

    Raises:
        ValueError: a directory without results, runs on different data, exits on different layers,
            a score that is not a number, or an unknown metric.
    """
    if not runs:
        raise ValueError("runs is empty: name the directories of some runs.")
    found = [_read(run) for run in runs]
    data = {f"{results['data']}, {_main_split(results)}" for results in found}
    if len(data) > 1:
        raise ValueError(
            f"runs on different data cannot share a figure: {'; '.join(sorted(data))}. Make one "
            "report for each."
        )
    by_layer = _layers(found[0])
    names = [name for name in next(iter(by_layer.values())) if name != "loss"]
    metric = names[0] if metric is None else metric
    if metric not in names:
        raise ValueError(
            f"metric={metric!r} is not among the runs' metrics.{did_you_mean(metric, names)}"
        )
    scores: dict[str, dict[int, list[float]]] = {}
    options: dict[str, dict[str, Any]] = {}
    for run, results in zip(runs, found, strict=True):
        label = run_label(results["options"])
        curve = scores.setdefault(label, {layer: [] for layer in _layers(results)})
        if list(curve) != list(_layers(results)):
            raise ValueError(
                f"{str(run)!r} ({label}) has exits on layers {list(_layers(results))}, another run "
                f"of that kind on {list(curve)}: they are not seeds of one experiment."
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
        for layer, metrics in _layers(results).items():
            value = metrics.get(metric)
            if not isinstance(value, float) or value != value:
                raise ValueError(
                    f"{str(run)!r}: {metric} at layer {layer} is {value}, not a number."
                )
            curve[layer].append(value)
    return next(iter(data)), metric, [Curve(label, curve) for label, curve in scores.items()]


def _read(run: Path) -> dict[str, Any]:
    file = run / "results.json" if run.is_dir() else run
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        _layers(results), run_label(results["options"])
    except FileNotFoundError:
        raise ValueError(
            f"{str(run)!r} holds no results.json: it is not a finished run of fusedacl train."
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, StopIteration):
        raise ValueError(f"{str(file)!r} is not the results.json of a run.") from None
    return results


def _main_split(results: Mapping[str, Any]) -> str:
    return str(next(iter(results["metrics"])))


def _layers(results: Mapping[str, Any]) -> dict[int, dict[str, float]]:
    by_layer = results["metrics"][_main_split(results)]
    return {int(layer): metrics for layer, metrics in by_layer.items()}


def write_report(runs: Sequence[Path], output_dir: Path, metric: str | None = None) -> list[Path]:
    """layer_scores.png, .svg, .csv and .md in `output_dir`; returns the files.

    Raises:
        ValueError: as `read_curves`; matplotlib is not installed.
    """
    require_matplotlib()
    data, metric, curves = read_curves(runs, metric)
    output_dir.mkdir(parents=True, exist_ok=True)
    figures = draw(data, metric, curves, output_dir / "layer_scores")
    layers = sorted({layer for curve in curves for layer in curve.scores})
    header = ["method", "seeds", *(f"layer {layer}" for layer in layers), "average"]
    rows, cells = [], []
    for curve in curves:
        values = [curve.scores.get(layer, ()) for layer in layers]
        columns = [*values, curve.averages]
        means = [f"{statistics.mean(column):.4f}" if column else "" for column in columns]
        rows.append([curve.label, str(curve.num_seeds), *means])
        cells.append([curve.label, str(curve.num_seeds), *map(_mean_and_deviation, columns)])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    words = (
        f"{metric} in percent on {data}, mean ± standard deviation (n - 1) over the seeds; a "
        "single seed has no deviation."
    )
    tables = [output_dir / "layer_scores.csv", output_dir / "layer_scores.md"]
    write_whole(tables[0], text.getvalue())
    write_whole(tables[1], f"{words}\n\n{markdown_table(header, cells)}\n")
    return [*figures, *tables]


def _mean_and_deviation(values: Sequence[float]) -> str:
    if not values:
        return ""
    percent = [100 * value for value in values]
    if len(percent) == 1:
        return f"{percent[0]:.1f}"
    return f"{statistics.mean(percent):.1f} ± {statistics.stdev(percent):.1f}"


def draw(data: str, metric: str, curves: Sequence[Curve], path: Path) -> list[Path]:
    """One line a method, its mean over the seeds, and their range: `path`.png and .svg."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    for index, curve in enumerate(curves):
        color, marker = _COLORS[index % len(_COLORS)], _MARKERS[index % len(_MARKERS)]
        layers = list(curve.scores)
        means = [100 * statistics.mean(curve.scores[layer]) for layer in layers]
        label = f"{curve.label}, average {100 * statistics.mean(curve.averages):.1f}"
        axes.plot(layers, means, color=color, marker=marker, markersize=5, label=label)
        if curve.num_seeds > 1:
            low = [100 * min(curve.scores[layer]) for layer in layers]
            high = [100 * max(curve.scores[layer]) for layer in layers]
            axes.fill_between(layers, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set_xlabel("layer of the exit")
    axes.set_ylabel(f"{metric.replace('_', ' ')} (%)")
    axes.set_title(f"{data}: score of each exit" + _seeds(curves))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False, loc="best")
    axes.spines[["top", "right"]].set_visible(False)
    written = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file in written:
        figure.savefig(file, dpi=150)
    return written


def _seeds(curves: Sequence[Curve]) -> str:
    most = max(curve.num_seeds for curve in curves)
    return "" if most == 1 else f" (mean and range of up to {most} seeds)"
