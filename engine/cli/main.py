"""The `fusedacl` command."""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from ..config import commands
from ..config.fields import given, parse
from ..config.spellings import translated
from ..config.training import TrainingConfig
from ..runtime.files import read_file
from ..runtime.signals import Interrupted
from ..runtime.text import did_you_mean

USAGE = """usage: fusedacl <verb> [config.yaml] [--option value …]

  train      fine-tune an encoder; without arguments: the demonstration on built-in data
  evaluate   compute the metrics of a trained model on a labelled data set
  predict    write labels and probabilities for a file of texts
  exits      sweep early-exit policies, calibrate one and store it with the model
  export     write a model with its early-exit policy for onnxruntime
  try        test on your own data, in a stated time, whether the contrastive term pays
  sweep      run a recipe of tasks, methods and seeds; can be stopped and continued
  angles     measure the angles between the gradients of two losses in trained runs
  tsne       draw and measure an exit's representations and the label embeddings
  report     write figures, tables and a page about a sweep or about several runs
  bench      measure the cost of losses, gate, training step, early exit and scaling
  doctor     describe what this machine can run, and why

fusedacl <verb> --help explains each option with its unit and default."""

# Other packages add verbs under this entry point group: verb = module:function, which takes the
# arguments and returns the exit status.
ENTRY_POINT_GROUP = "fusedacl.commands"
_PATIENCE_SECONDS = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status: 0, 1 (failed), 2 (mistake in the input)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    # Messages that concern all processes come from the first one.
    is_first = os.environ.get("RANK", "0") == "0"
    logging.getLogger("fusedacl").setLevel(logging.INFO if is_first else logging.WARNING)
    # Added by the deepspeed launcher; the environment contains it as well.
    arguments = [word for word in arguments if not word.startswith("--local_rank=")]
    verb, rest = arguments[0], arguments[1:]
    try:
        return _find(verb)(rest)
    except ValueError as error:
        rank, place = os.environ.get("RANK", "0"), ""
        if rank != "0":
            # Processes mostly fail for the same reason, which process 0 should report; the launcher
            # ends all of them as soon as one has ended, so the others wait.
            time.sleep(_PATIENCE_SECONDS)
            place = f"process {rank} on {socket.gethostname()}: "
        print(f"fusedacl {verb}: {place}{error}", file=sys.stderr)
        return 2
    except (FloatingPointError, OSError) as error:
        print(f"fusedacl {verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"fusedacl {verb}: interrupted.", file=sys.stderr)
        return 130


def _find(verb: str) -> Callable[[list[str]], int]:
    if verb in _VERBS:
        return _VERBS[verb]
    installed = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if verb not in installed and verb != "bench":
        known = [*_VERBS, "bench", *installed]
        raise ValueError(f"Unknown verb {verb!r}.{did_you_mean(verb, known)}")
    try:
        return installed[verb].load()
    except (KeyError, ModuleNotFoundError) as error:
        why = "" if isinstance(error, KeyError) else f" ({error})"
        raise ValueError(
            f"this verb is not installed{why}. In a checkout, install again: pip install -e ."
        ) from None


def _run(verb: str, arguments: list[str]) -> int:
    description, config_class, module, name, show = _COMMANDS[verb]
    program, before = f"fusedacl {verb}", []
    if verb in ("angles", "tsne"):
        program += " RUN [RUN ...]"
        runs, arguments = _runs_first(arguments)
        before = [runs]
    config: Any = parse(config_class, program, description, arguments)
    function = getattr(import_module(f"...{module}", __name__), name)
    _quiet_transformers()
    return show(function(*before, config))


def _train(arguments: list[str]) -> int:
    if not arguments:
        from .demo import run_demo

        _quiet_transformers()
        try:
            run_demo()
        except Interrupted as stop:
            print("fusedacl train: stopped; the demonstration starts anew.", file=sys.stderr)
            return stop.exit_code
        return 0
    config = parse(TrainingConfig, "fusedacl train", "Fine-tune a BERT-like encoder.", arguments)
    # Mistakes are reported before torch and transformers are imported.
    config.resolved()
    from ..runtime import processes
    from ..training.run import train

    _quiet_transformers()
    try:
        results = train(config)
    except Interrupted as stop:
        print(f"fusedacl train: {stop}", file=sys.stderr)
        return stop.exit_code
    if processes.rank() > 0:
        return 0
    predicted = results.get("predictions", {}).items()
    tests = {name: found["metrics"] for name, found in predicted if found["metrics"] is not None}
    _print_metrics(results["metrics"] | tests)
    for line in _gate_lines(results["gate"]):
        print(line)
    print(f"model, metrics.jsonl and results.json are in {config.run.output_dir}")
    return 0


def _try(arguments: list[str]) -> int:
    made = argparse.ArgumentParser(
        prog="fusedacl try",
        usage="%(prog)s [config.yaml] [--minutes N] [--output_dir DIR] [--option value ...]",
        description="Train with cross-entropy, CE+SCL and ACL a few times on draws of your data,"
        " and tell whether the contrastive term pays there, and what it costs. The same command"
        " continues a trial that was stopped, and with more minutes adds draws. Options of"
        " `fusedacl train` name the data and the encoder and hold for all runs.",
        allow_abbrev=False,
    )
    words = (
        "minutes for all runs, of all sessions; a draw that would not end in time is not started"
    )
    made.add_argument("--minutes", type=float, default=20.0, help=f"{words} (default: 20)")
    words = "largest number of draws, however short they are"
    made.add_argument("--draws", type=int, default=10, help=f"{words} (default: 10)")
    words = "smallest gain, in points, that is worth the price"
    made.add_argument("--min_gain", type=float, default=0.5, help=f"{words} (default: 0.5)")
    words = "directory of the trial"
    made.add_argument("--output_dir", type=Path, help=f"{words} (default: runs/try)")
    own, rest = made.parse_known_args(arguments)
    if not 0 <= own.min_gain <= 100:
        raise ValueError(f"min_gain={own.min_gain:g}: points from 0 to 100.")
    options = given(TrainingConfig, rest)
    config_file = options.pop("config_file", None)
    from_file = read_file(config_file) if config_file else {}
    in_file = from_file.pop("output_dir", None)
    directory = own.output_dir or Path(in_file or Path("runs") / "try")
    options = {**translated(from_file, options), **translated(options, from_file)}
    from ..experiments.sweep import SweepStopped
    from ..experiments.trial.answer import answer
    from ..experiments.trial.setting import read_setting
    from ..experiments.trial.trial import Trial
    from ..reports.sweep_report import report_sweep
    from ..runtime.plots import require_matplotlib

    require_matplotlib()
    _quiet_transformers()
    trial = Trial(read_setting(options), directory, own.minutes, own.draws)
    try:
        failures = trial.run()
    except SweepStopped as stop:
        for line in answer(trial, own.min_gain):
            print(line)
        print(f"fusedacl try: {stop}", file=sys.stderr)
        return stop.exit_code
    lines = answer(trial, own.min_gain)
    if lines:
        page = report_sweep(directory, answer=lines).page
        print("\n".join([*lines, f"page: {page}"]))
    for failure in failures:
        print(f"fusedacl try: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _sweep(arguments: list[str]) -> int:
    from ..experiments.recipe import read_recipe, shipped_recipes

    made = argparse.ArgumentParser(
        prog="fusedacl sweep",
        usage="%(prog)s recipe.yaml [--output_dir DIR] [--workers N] [--status]"
        " [--option value ...]",
        description="Run what a recipe describes, each run in a directory of its own. The same"
        " command continues a sweep that was stopped. Any option of `fusedacl train` replaces the"
        " recipe's default.",
        epilog=f"Shipped recipes: {', '.join(shipped_recipes())}.",
        allow_abbrev=False,
    )
    made.add_argument("recipe", help="YAML file, or the name of a shipped recipe")
    words = "directory of the sweep (default: runs/<name of the recipe>)"
    made.add_argument("--output_dir", type=Path, help=words)
    made.add_argument(
        "--workers", type=int, help="runs at the same time (default: one per two CPU cores)"
    )
    made.add_argument("--status", action="store_true", help="show the progress, run nothing")
    options, rest = made.parse_known_args(arguments)
    flags, recipe = given(TrainingConfig, rest), read_recipe(options.recipe)
    defaults = recipe.get("defaults") or {}
    recipe["defaults"] = {**translated(defaults, flags), **translated(flags, defaults)}
    directory = options.output_dir or Path("runs") / Path(options.recipe).stem
    from ..experiments.sweep import Sweep, SweepStopped

    sweep = Sweep(recipe, directory, options.workers)
    try:
        if options.status:
            sweep.recall()
        else:
            sweep.run()
    except SweepStopped as stop:
        print(f"{sweep.table()}\nfusedacl sweep: {stop}", file=sys.stderr)
        return stop.exit_code
    print("\n".join([sweep.table(), *sweep.failures]))
    if not options.status:
        print(f"runs are in {directory}; next: fusedacl report {directory}")
    return 1 if sweep.failures else 0


def _runs_first(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """Split off the directories before the options; a YAML file belongs to the options.

    Raises:
        ValueError: there is no directory, and help is not asked for.
    """
    options = (".yaml", ".yml", ".json")
    named = itertools.takewhile(
        lambda argument: not argument.startswith("-") and not argument.endswith(options), arguments
    )
    runs = [Path(name) for name in named]
    if not runs and not {"-h", "--help"} & set(arguments):
        raise ValueError("no run is named: the directories of runs come before the options.")
    return runs, arguments[len(runs) :]


def _report(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fusedacl report",
        description="Write figures, tables and a page (index.html) about a sweep or several runs.",
    )
    words = "directory of a sweep, or directories of runs; seeds of one method become one line"
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help=words)
    parser.add_argument(
        "--output_dir", type=Path, help="directory of the files (default for a sweep: SWEEP/report)"
    )
    parser.add_argument("--metric", help="metric of the runs (default: the first of each task)")
    options = parser.parse_args(arguments)
    from ..reports.sweep_report import write_report
    from ..runtime.text import markdown_table

    report = write_report(options.paths, options.output_dir, options.metric)
    for section in report.sections:
        for table in section.tables:
            print(f"{section.title}\n\n{markdown_table(table.header, table.rows)}\n")
    print("\n".join(report.findings))
    print(f"written: {report.page}, and figures and tables beside it")
    return 0


def _doctor(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("-h", "--help"):
        print("usage: fusedacl doctor\n\nDescribe what this machine can run, and why; no options.")
        return 0
    if arguments:
        raise ValueError("doctor takes no arguments: it describes this machine.")
    from .doctor import diagnose

    print("\n".join(diagnose()))
    return 0


def _print_metrics(metrics: dict[str, dict[int, dict[str, float]]]) -> int:
    for split, by_layer in metrics.items():
        for layer, scores in by_layer.items():
            words = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
            print(f"{split}, exit at layer {layer}: {words}")
    return 0


def _print_file(file: Path) -> int:
    print(f"labels and probabilities are in {file}")
    return 0


def _print_study(results: dict[str, Any]) -> int:
    print("\n".join(results["lines"]))
    return 0 if results["complete"] else 130


def _print_export(results: dict[str, Any]) -> int:
    from ..inference.export.command import lines_of

    print("\n".join(lines_of(results)))
    return 0


def _print_report(report: tuple[str, list[Path]]) -> int:
    table, files = report
    print(f"{table}\nwritten: {', '.join(map(str, files))}")
    return 0


def _gate_lines(gate: list[dict[str, Any]]) -> list[str]:
    """Format one line per epoch: the share of steps in which each group's gradient was dropped."""
    lines = []
    for epoch in dict.fromkeys(row["epoch"] for row in gate):
        rows = [row for row in gate if row["epoch"] == epoch]
        shares = ", ".join(f"{row['group']} {row['dropped_share']:.0%}" for row in rows)
        dropped = statistics.mean(row["dropped_share"] for row in rows)
        angle = statistics.median(row["angle_median"] for row in rows)
        lines.append(
            f"epoch {epoch}: gate dropped {dropped:.1%} of {rows[0]['steps']} steps"
            + (f" ({shares})" if len(rows) > 1 else "")
            + f", median angle {angle:.1f} degrees"
        )
        compared = sum(row.get("compared_steps", 0) for row in rows)
        if compared:
            # With a gate_scope there is only one group.
            share = rows[0]["agreement_share"]
            lines[-1] += f", as the exact gate decides in {share:.1%} of {compared} steps compared"
    return lines


def _quiet_transformers() -> None:
    """Turn off progress bars and advice of transformers and deepspeed."""
    import torch

    if not torch.cuda.is_available():
        # transformers imports deepspeed if it is installed, which would warn about a missing GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


# Verb: description, class of its configuration, module and name of its function, and the function
# that prints the result and returns the exit status.
_COMMANDS: dict[str, tuple[str, type, str, str, Callable[[Any], int]]] = {
    "evaluate": (
        "Compute the metrics of a trained model.",
        *(commands.EvaluationConfig, "inference.evaluation", "evaluate", _print_metrics),
    ),
    "predict": (
        "Write labels and probabilities of texts.",
        *(commands.PredictionConfig, "inference.prediction", "predict", _print_file),
    ),
    "exits": (
        "Sweep early-exit policies, calibrate one and store it with the model.",
        *(commands.ExitsConfig, "inference.calibration.study", "study_exits", _print_study),
    ),
    "export": (
        "Write a model with its early-exit policy for onnxruntime.",
        *(commands.ExportConfig, "inference.export.command", "export_model", _print_export),
    ),
    "angles": (
        "Measure angles between the gradients of cross-entropy and contrastive loss.",
        *(commands.AngleConfig, "reports.analyses.angle_report", "report_angles", _print_report),
    ),
    "tsne": (
        "Draw and measure representations and label embeddings (t-SNE).",
        commands.TSNEConfig,
        *("reports.analyses.representation_report", "report_representations", _print_report),
    ),
}
_VERBS: dict[str, Callable[[list[str]], int]] = {
    **{verb: partial(_run, verb) for verb in _COMMANDS},
    **{"train": _train, "try": _try, "sweep": _sweep, "report": _report, "doctor": _doctor},
}
