"""What early exit costs and brings: measured times, tables and the quality-speed figure."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import report
from .batching import EncodedSplit, collate, epoch_batches
from .calibration import AREA_WORDS, SweepRow, frontier
from .early_exiting import EarlyExit
from .exit_policies import Policy
from .precision import autocast

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .modeling import MultiExitForSequenceClassification

FIGURE_SUFFIXES = (".png", ".svg")
# Told apart in grey and by those who see few colours: a colour and a marker each.
_LOOKS: dict[str, tuple[str, str]] = {
    "max_probability": ("#0072b2", "o"),
    "entropy": ("#e69f00", "s"),
    "patience": ("#009e73", "^"),
    "patience_confidence": ("#cc79a7", "D"),
    "voting": ("#56b4e9", "v"),
    "learned": ("#d55e00", "P"),
    "fixed_layer": ("#777777", "x"),
}
_INTEGER_POLICIES = ("patience", "voting", "fixed_layer")


@dataclass(frozen=True)
class MeasuredSpeed:
    """Wall-clock of one policy against the full model on the same texts.

    Milliseconds per text, medians over `repeats` passes; speedup: the median of full / early over
    the passes, in each of which all that were timed took turns batch by batch.
    """

    batch_size: int
    num_texts: int
    repeats: int
    early_ms: float
    full_ms: float
    speedup: float


@torch.inference_mode()
def measure_speed(
    model: MultiExitForSequenceClassification,
    encoded: EncodedSplit,
    policies: Sequence[Policy],
    batch_size: int,
    *,
    pad_token_id: int,
    dtype: torch.dtype = torch.float32,
    max_texts: int = 200,
    repeats: int = 3,
    progress: bool = False,
) -> list[MeasuredSpeed]:
    """Time policies and the plain full model (backbone and last exit), all taking turns.

    The texts are spread evenly over the split, collated beforehand and on the model's device; a
    pass runs all of their batches. The model is left in evaluation mode.
    """
    texts = np.unique(np.linspace(0, len(encoded) - 1, min(max_texts, len(encoded))).astype(int))
    batches = epoch_batches(
        encoded.lengths[texts], batch_size, seed=0, epoch=0, shuffle=False, group_by_length=True
    )
    inputs = []
    for indices in batches:
        tensors = collate(encoded, texts[indices], pad_token_id)
        tensors.pop("labels", None)
        inputs.append({name: value.to(model.device) for name, value in tensors.items()})

    def full(**batch: Tensor) -> None:
        with autocast(model.device, dtype):
            states = model.backbone(**batch, return_dict=True).last_hidden_state
            logits = model.exits[-1](states, batch["attention_mask"]).logits
        torch.softmax(logits.float(), dim=-1).cpu()

    engines = [EarlyExit(model, policy, dtype=dtype) for policy in policies]
    runs: list[Callable[..., Any]] = [full, *engines]
    for run in runs:
        run(**inputs[0])
    seconds = np.zeros((repeats, len(runs)))
    names = ", ".join(dict.fromkeys(policy.name for policy in policies))
    rounds = tqdm(
        total=repeats * len(inputs),
        desc=f"time {names}, batch {batch_size}",
        leave=False,
        disable=None if progress else True,
    )
    with rounds:
        for repeat in range(repeats):
            for number, batch in enumerate(inputs, start=repeat):
                # Who goes first rotates: none always finds the warmer cache.
                for turn in range(number, number + len(runs)):
                    run = runs[turn % len(runs)]
                    start = time.perf_counter()
                    run(**batch)
                    seconds[repeat, turn % len(runs)] += time.perf_counter() - start
                rounds.update()
    milliseconds = 1000 * np.median(seconds, axis=0) / len(texts)
    speedups = np.median(seconds[:, :1] / seconds, axis=0)
    return [
        MeasuredSpeed(
            batch_size=batch_size,
            num_texts=len(texts),
            repeats=repeats,
            early_ms=float(milliseconds[place]),
            full_ms=float(milliseconds[0]),
            speedup=float(speedups[place]),
        )
        for place in range(1, len(runs))
    ]


def draw_quality_speed(
    curves: Mapping[str, Sequence[SweepRow]],
    full_score: float,
    metric: str,
    path: Path,
    measured: Mapping[Policy, Sequence[MeasuredSpeed]] | None = None,
) -> list[Path]:
    """Quality against speed of each policy, as `path`.png and .svg.

    The first panel: score against operations of the best settings. Where some were timed, one more
    a batch size: score against speed-up. The full model is a star; where it loses 1 % is a line.

    Args:
        curves: policy name -> its rows.
        measured: wall-clock of the settings that were timed.

    Raises:
        ValueError: there is no row, or matplotlib is not installed.
    """
    if not any(curves.values()):
        raise ValueError("curves is empty: sweep a policy first.")
    report.require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    measured = measured or {}
    sizes = _batch_sizes(measured)
    width = 4.2 * (1 + len(sizes)) if sizes else 7.2
    figure = Figure(figsize=(width, 4.9), layout="constrained")
    first, *others = figure.subplots(1, 1 + len(sizes), sharey=True, squeeze=False)[0]
    shares = {
        name: [(row.flops_share, row.score) for row in frontier(rows)]
        for name, rows in curves.items()
    }
    _draw_panel(first, shares, full_score)
    first.set_xlim(left=0)
    first.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    first.set_xlabel("operations per text (% of the full model's FLOPs)")
    first.set_ylabel(metric.replace("_", " "))
    for size, axes in zip(sizes, others, strict=True):
        speedups = {
            name: [
                (speed.speedup, row.score)
                for row in sorted(rows, key=lambda row: row.flops_share)
                for speed in measured.get(row.policy, ())
                if speed.batch_size == size
            ]
            for name, rows in curves.items()
        }
        _draw_panel(axes, speedups, full_score)
        axes.xaxis.set_major_formatter("{x:g}x")
        axes.set_xlabel(f"measured speed, batch {size} (full model: 1x)")
    figure.suptitle("Quality and speed of early exit")
    # Below the axes: curves may lie anywhere in them.
    handles, labels = first.get_legend_handles_labels()
    columns = round(width / 2.4)
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=columns)
    written = [path.with_name(path.name + suffix) for suffix in FIGURE_SUFFIXES]
    for file in written:
        figure.savefig(file, dpi=150)
    return written


def _draw_panel(
    axes: Axes, lines: Mapping[str, Sequence[tuple[float, float]]], full_score: float
) -> None:
    """Policy name -> its points, beside the full model at 1."""
    for name, points in lines.items():
        color, marker = _LOOKS[name]
        axes.plot(
            [x for x, _ in points],
            [score for _, score in points],
            color=color,
            marker=marker,
            markersize=4.5,
            # Dotted: there is nothing between two settings, where a threshold can be anything.
            linestyle=":" if name in _INTEGER_POLICIES else "-",
            linewidth=1.4,
            label=name.replace("_", " "),
        )
    axes.plot(
        1,
        full_score,
        marker="*",
        markersize=14,
        color="black",
        linestyle="",
        zorder=3,
        label="full model",
    )
    axes.axhline(
        full_score - 0.01 * abs(full_score),
        color="black",
        linewidth=0.8,
        linestyle="--",
        label="1 % below the full model",
    )
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _batch_sizes(measured: Mapping[Policy, Sequence[MeasuredSpeed]]) -> list[int]:
    return sorted({speed.batch_size for speeds in measured.values() for speed in speeds})


def write_tables(
    curves: Mapping[str, Sequence[SweepRow]],
    areas: Mapping[str, float],
    metric: str,
    path: Path,
    measured: Mapping[Policy, Sequence[MeasuredSpeed]] | None = None,
) -> list[Path]:
    """Sweeps as `path`.csv and .md: policy, parameters, score, mean layer, FLOPs, times.

    Args:
        curves: policy name -> its rows.
        areas: policy name -> its area under the curve; a column of the CSV, where each row has to
            stand alone, a table of its own on the page.
        measured: wall-clock of the settings that were timed; empty cells at the others.
    """
    measured = measured or {}
    sizes = _batch_sizes(measured)
    header = ["policy", "parameters", metric, "mean_layer", "flops_share"]
    num_facts = len(header)
    for size in sizes:
        header += [f"ms_per_text_batch_{size}", f"speedup_batch_{size}"]
    table, numbers = [], []
    for name, rows in curves.items():
        for row in rows:
            words = " ".join(f"{key}={value:.6g}" for key, value in row.policy.parameters.items())
            cells = [name, words, f"{row.score:.4f}", f"{row.mean_layer:.3f}"]
            cells.append(f"{row.flops_share:.4f}")
            speeds = {speed.batch_size: speed for speed in measured.get(row.policy, ())}
            for size in sizes:
                speed = speeds.get(size)
                cells += [f"{speed.early_ms:.3f}", f"{speed.speedup:.2f}"] if speed else ["", ""]
            table.append(cells)
            numbers.append([*cells[:num_facts], f"{areas[name]:.4f}", *cells[num_facts:]])
    of_policies = report.markdown_table(
        ["policy", "area under the curve"], [[name, f"{areas[name]:.4f}"] for name in curves]
    )
    intro = f"{of_policies}\n\nArea under the curve: {AREA_WORDS}.\n\nThe settings swept:"
    of_csv = [*header[:num_facts], "area_under_curve", *header[num_facts:]]
    return report.write_tables(path, header, table, intro, (of_csv, numbers))
