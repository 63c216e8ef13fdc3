"""What early exit costs and brings: measured times, tables and the quality-speed figure."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import report
from .batching import EncodedSplit, collate, epoch_batches
from .calibration import SweepRow, frontier
from .early_exiting import EarlyExit
from .exit_policies import Policy
from .precision import autocast

if TYPE_CHECKING:
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
    the passes, in each of which the two took turns batch by batch.
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
    policy: Policy,
    batch_size: int,
    *,
    pad_token_id: int,
    dtype: torch.dtype = torch.float32,
    max_texts: int = 200,
    repeats: int = 3,
    progress: bool = False,
) -> MeasuredSpeed:
    """Time a policy and the plain full model (backbone and last exit), taking turns.

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
    engine = EarlyExit(model, policy, dtype=dtype)

    def early(batch: dict[str, Tensor]) -> None:
        engine(**batch)

    def full(batch: dict[str, Tensor]) -> None:
        with autocast(model.device, dtype):
            states = model.backbone(**batch, return_dict=True).last_hidden_state
            logits = model.exits[-1](states, batch["attention_mask"]).logits
        torch.softmax(logits.float(), dim=-1).cpu()

    for run in (early, full):
        run(inputs[0])
    seconds: dict[Any, list[float]] = {early: [], full: []}
    rounds = tqdm(
        total=repeats * len(inputs),
        desc=f"time {policy.name}, batch {batch_size}",
        leave=False,
        disable=None if progress else True,
    )
    with rounds:
        for repeat in range(repeats):
            for run in seconds:
                seconds[run].append(0.0)
            for number, batch in enumerate(inputs, start=repeat):
                # Which of the two goes first alternates: neither always finds the warmer cache.
                for run in (early, full) if number % 2 else (full, early):
                    start = time.perf_counter()
                    run(batch)
                    seconds[run][-1] += time.perf_counter() - start
                rounds.update()
    pairs = zip(seconds[full], seconds[early], strict=True)
    return MeasuredSpeed(
        batch_size=batch_size,
        num_texts=len(texts),
        repeats=repeats,
        early_ms=1000 * statistics.median(seconds[early]) / len(texts),
        full_ms=1000 * statistics.median(seconds[full]) / len(texts),
        speedup=statistics.median(slow / fast for slow, fast in pairs),
    )


def draw_quality_speed(
    curves: Mapping[str, Sequence[SweepRow]], full_score: float, metric: str, path: Path
) -> list[Path]:
    """The best settings of each policy, score against operations, as `path`.png and .svg.

    `curves`: policy name -> its rows. The full model is a star; where it loses 1 % is a line.

    Raises:
        ValueError: there is no row, or matplotlib is not installed.
    """
    if not any(curves.values()):
        raise ValueError("curves is empty: sweep a policy first.")
    report.require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(8.6, 4.6), layout="constrained")
    axes = figure.subplots()
    for name, rows in curves.items():
        best = frontier(rows)
        color, marker = _LOOKS[name]
        axes.plot(
            [row.flops_share for row in best],
            [row.score for row in best],
            color=color,
            marker=marker,
            markersize=4.5,
            # Dotted: there is nothing between two settings, where a threshold can be anything.
            linestyle=":" if name in _INTEGER_POLICIES else "-",
            linewidth=1.4,
            label=name.replace("_", " "),
        )
    axes.plot(1, full_score, marker="*", markersize=14, color="black", linestyle="", zorder=3)
    axes.annotate(
        "full model",
        (1, full_score),
        xytext=(-8, 9),
        textcoords="offset points",
        horizontalalignment="right",
    )
    axes.axhline(
        full_score - 0.01 * abs(full_score),
        color="black",
        linewidth=0.8,
        linestyle="--",
        label="1 % below the full model",
    )
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("operations per text (% of the full model's FLOPs)")
    axes.set_ylabel(metric.replace("_", " "))
    axes.set_title("Quality and speed of early exit")
    axes.grid(alpha=0.25, linewidth=0.6)
    # Beside the axes: curves may lie anywhere in them.
    figure.legend(frameon=False, loc="outside right center")
    axes.spines[["top", "right"]].set_visible(False)
    written = [path.with_name(path.name + suffix) for suffix in FIGURE_SUFFIXES]
    for file in written:
        figure.savefig(file, dpi=150)
    return written


def write_tables(
    rows: Sequence[SweepRow],
    metric: str,
    path: Path,
    measured: Mapping[Policy, Sequence[MeasuredSpeed]] | None = None,
) -> list[Path]:
    """Sweep rows as `path`.csv and .md: policy, parameters, score, mean layer, FLOPs, times.

    `measured`: wall-clock of the settings that were timed; empty cells at the others.
    """
    measured = measured or {}
    sizes = sorted({speed.batch_size for speeds in measured.values() for speed in speeds})
    header = ["policy", "parameters", metric, "mean_layer", "flops_share"]
    for size in sizes:
        header += [f"ms_per_text_batch_{size}", f"speedup_batch_{size}"]
    table = []
    for row in rows:
        words = " ".join(f"{name}={value:.6g}" for name, value in row.policy.parameters.items())
        cells = [row.policy.name, words, f"{row.score:.4f}", f"{row.mean_layer:.3f}"]
        cells.append(f"{row.flops_share:.4f}")
        speeds = {speed.batch_size: speed for speed in measured.get(row.policy, ())}
        for size in sizes:
            speed = speeds.get(size)
            cells += [f"{speed.early_ms:.3f}", f"{speed.speedup:.2f}"] if speed else ["", ""]
        table.append(cells)
    return report.write_tables(path, header, table)
