"""The demonstration: CE and ACL on the built-in data set, then early exit of the ACL model."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.commands import ExitsConfig
from ..config.fields import build
from ..config.training import TrainingConfig
from ..data.quickstart import minilm_path
from ..experiments.runs import OBJECTIVE_NAMES
from ..inference.calibration.study import study_exits
from ..reports.run_figures import draw_angle_histogram, draw_loss_curves
from ..reports.sweep_report import report_runs
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
        "learning_rate": 1.3e-4,
        "num_train_epochs": 2.5,
        "logging_steps": 1,
        "save_steps": 0,
        "output_dir": str(output_dir),
        "overwrite_output_dir": True,
    }


def exits_options(stage1_model: Path, output_dir: Path) -> dict[str, Any]:
    """Return the options of the run that trains the other exits on the frozen backbone."""
    return {
        **demo_options("acl", output_dir),
        "strategy": "two_stage",
        "stage1_model": str(stage1_model),
        "stage2_learning_rate": 1e-3,
        "feature_cache": str(output_dir.with_name("features")),
    }


def run_demo(output_dir: Path = DEMO_DIR) -> dict[str, dict[str, Any]]:
    """Train on the quickstart set with CE, with ACL, then exits on ACL's backbone; show all.

    Prints the scores and the speed of early exit, and writes two figures and one page.

    Returns: "ce", "acl", "exits" -> results of the run; "early_exit" -> those of `study_exits`.

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
    exits = output_dir / "exits"
    options = exits_options(runs["acl"], exits)
    # A cache of 2,000 texts serves this run alone; a demonstration that was stopped has left one.
    shutil.rmtree(options["feature_cache"], ignore_errors=True)
    results["exits"] = train(TrainingConfig.create(**options))
    shutil.rmtree(options["feature_cache"])
    results["early_exit"] = study_exits(build(ExitsConfig, study_options(exits)))
    page = report_runs([*runs.values(), exits], output_dir / "report").page
    print("\nValidation scores on the built-in sentence pairs (chance: 33.3%):\n")
    print(_scores(results))
    print(f"\n{_speed(results['early_exit'])}")
    print(f"\nPage: {page}")
    print(f"Figures: {', '.join(str(figure) for figure in figures)}")
    places = ", ".join(map(str, [*runs.values(), exits]))
    print(f"Models, metrics.jsonl and results.json: {places}")
    print(
        f"{time.monotonic() - started:.0f} s in all. One seed each: a difference of a point or "
        "two is noise."
    )
    return results


def study_options(model: Path) -> dict[str, Any]:
    """Return the options of the study of early exit, named as on the command line."""
    return {
        "model_name_or_path": str(model),
        "task_name": "quickstart",
        "policies": "max_probability",
        "measure": True,
        "measured_samples": 50,
        "output_dir": str(model / "exits"),
    }


def _scores(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of both objectives."""
    rows = []
    for objective in OBJECTIVES:
        result = results[objective]
        scores = next(iter(result["metrics"]["validation"].values()))
        shown = [f"{scores['accuracy']:.1%}", f"{scores['macro_f1']:.1%}", f"{scores['loss']:.3f}"]
        steps = sum(row["steps"] for row in result["gate"])
        dropped = sum(row["dropped_share"] * row["steps"] for row in result["gate"])
        shown += [f"{dropped / steps:.1%}" if steps else "-", f"{result['train_seconds']:.0f} s"]
        rows.append([OBJECTIVE_NAMES[objective], *shown])
    header = ["objective", "accuracy", "macro F1", "loss", "steps dropped by the gate", "time"]
    return text_table(header, rows)


def _speed(study: Mapping[str, Any]) -> str:
    """The measured speed of the policies at their chosen settings."""
    lines = [
        f"Early exit of the ACL model, at most 1 % below its accuracy of {study['full_score']:.1%}:"
    ]
    for name, found in study["policies"].items():
        if "calibration" not in found:
            lines.append(f"  {name}: no setting comes so close")
            continue
        facts = found["calibration"]
        speeds = " and ".join(
            f"{_faster(speed['speedup'])} at batch {speed['batch_size']}"
            for speed in found["measured"]
        )
        layers = f"{facts['mean_layer']:.1f} of {study['exit_layers'][-1]} layers"
        lines.append(f"  {name}: accuracy {facts['score']:.1%}, {layers} on average, {speeds}")
    return "\n".join(lines)


def _faster(speedup: float) -> str:
    return f"{speedup:.1f} times faster" if round(speedup, 1) > 1 else "not faster"
