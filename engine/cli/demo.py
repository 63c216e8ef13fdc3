"""The demonstration: cross-entropy and ACL on the embedded data set, side by side."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ..config.training import TrainingConfig
from ..data.quickstart import minilm_path
from ..experiments.runs import OBJECTIVE_NAMES
from ..reports.run_figures import draw_angle_histogram, draw_loss_curves
from ..runtime.plots import require_matplotlib
from ..runtime.text import text_table
from ..training.run import train

DEMO_DIR = Path("runs") / "demo"
OBJECTIVES = ("ce", "acl")


def demo_options(objective: str, output_dir: Path) -> dict[str, Any]:
    """Return the options of one run of the demonstration, named as on the command line."""
    return {
        "task_name": "quickstart",
        "objective": objective,
        **({} if objective == "ce" else {"contrastive_reduction": "sum"}),
        "max_seq_length": 48,
        "group_by_length": True,
        "learning_rate": 1e-4,
        "num_train_epochs": 3,
        "logging_steps": 1,
        "save_steps": 0,
        "output_dir": str(output_dir),
        "overwrite_output_dir": True,
    }


def run_demo(output_dir: Path = DEMO_DIR) -> dict[str, dict[str, Any]]:
    """Train with CE and with ACL on the quickstart set, print a comparison and draw two figures.

    Returns: objective -> results of the run.

    Raises:
        ValueError: the extra `demo` is not installed.
    """
    require_matplotlib()
    minilm_path()
    started = time.monotonic()
    runs = {objective: output_dir / objective for objective in OBJECTIVES}
    results = {
        objective: train(TrainingConfig.create(**demo_options(objective, run)))
        for objective, run in runs.items()
    }
    figures = [
        draw_loss_curves(runs, output_dir / "loss_curves.png"),
        draw_angle_histogram(runs["acl"], output_dir / "gradient_angles.png"),
    ]
    rows = []
    for objective, result in results.items():
        scores = next(iter(result["metrics"]["validation"].values()))
        shown = [f"{scores['accuracy']:.1%}", f"{scores['macro_f1']:.1%}", f"{scores['loss']:.3f}"]
        steps = sum(row["steps"] for row in result["gate"])
        dropped = sum(row["dropped_share"] * row["steps"] for row in result["gate"])
        shown += [f"{dropped / steps:.1%}" if steps else "-", f"{result['train_seconds']:.0f} s"]
        rows.append([OBJECTIVE_NAMES[objective], *shown])
    header = ["objective", "accuracy", "macro F1", "loss", "steps dropped by the gate", "time"]
    print("\nValidation scores on the embedded sentence pairs (chance: 33.3%):\n")
    print(text_table(header, rows))
    print(f"\nFigures: {', '.join(str(figure) for figure in figures)}")
    print(f"Models, metrics.jsonl and results.json: {', '.join(map(str, runs.values()))}")
    print(
        f"{time.monotonic() - started:.0f} s in all. One seed each: a difference of a point or "
        "two is noise."
    )
    return results
