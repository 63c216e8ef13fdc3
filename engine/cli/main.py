"""The `fusedacl` command."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..config.fields import parse
from ..runtime.text import did_you_mean

USAGE = """usage: fusedacl <verb> [config.yaml] [--option value …]

  train      fine-tune an encoder; without arguments: the demonstration on embedded data
  evaluate   metrics of a trained model on a labelled data set
  predict    labels and probabilities for a file of texts
  exits      early exit: sweep policies, choose a threshold, store it with the model
  sweep      the runs of a recipe: tasks, methods, seeds; stops and goes on
  angles     angles between the gradients of two losses, over a run's parameters and layers
  tsne       an exit's representations with the label embeddings, drawn and measured
  report     figures, tables and a page of a sweep, or of several runs
  bench      what losses, gate, steps, exits and scaling cost here, beside what others use
  doctor     what this machine can run, and why

fusedacl <verb> --help explains each option with its unit and default."""


_PATIENCE_SECONDS = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0, 1 (the run failed), 2 (a mistake in the input)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("fusedacl").setLevel(logging.INFO)
    # The deepspeed launcher adds this; the environment says it too.
    arguments = [word for word in arguments if not word.startswith("--local_rank=")]
    verb, rest = arguments[0], arguments[1:]
    try:
        if verb not in _VERBS:
            raise ValueError(f"Unknown verb {verb!r}.{did_you_mean(verb, _VERBS)}")
        return _VERBS[verb](rest)
    except ValueError as error:
        print(f"fusedacl {verb}: {_after_the_first_process()}{error}", file=sys.stderr)
        return 2
    except (FloatingPointError, OSError) as error:
        print(f"fusedacl {verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"fusedacl {verb}: interrupted.", file=sys.stderr)
        return 130


def _after_the_first_process() -> str:
    """Who speaks, in a run of several processes, after process 0 had time to.

    They mostly make the same mistake, which one of them should tell; and the launcher ends all of
    them as soon as one has ended, so the others wait.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        return ""
    time.sleep(_PATIENCE_SECONDS)
    return f"process {rank} on {socket.gethostname()}: "


def _train(arguments: list[str]) -> int:
    from ..config.training import TrainingConfig

    if not arguments:
        from ..runtime.signals import Interrupted
        from .demo import run_demo

        _quiet_transformers()
        try:
            run_demo()
        except Interrupted as stop:
            print("fusedacl train: stopped; the demonstration starts anew.", file=sys.stderr)
            return stop.exit_code
        return 0
    config = parse(TrainingConfig, "fusedacl train", "Fine-tune a BERT-like encoder.", arguments)
    # Mistakes are told before torch and transformers are loaded.
    config.resolved()
    from ..runtime import processes
    from ..runtime.signals import Interrupted
    from ..training.run import train

    _quiet_transformers()
    try:
        results = train(config)
    except Interrupted as stop:
        print(f"fusedacl train: {stop}", file=sys.stderr)
        return stop.exit_code
    if processes.rank() > 0:
        return 0
    _print_metrics(results["metrics"])
    for line in _gate_lines(results["gate"]):
        print(line)
    print(f"model, metrics.jsonl and results.json are in {config.run.output_dir}")
    return 0


def _evaluate(arguments: list[str]) -> int:
    from ..config.commands import EvaluationConfig

    config = parse(EvaluationConfig, "fusedacl evaluate", "Metrics of a trained model.", arguments)
    from ..inference.evaluation import evaluate

    _quiet_transformers()
    _print_metrics(evaluate(config))
    return 0


def _predict(arguments: list[str]) -> int:
    from ..config.commands import PredictionConfig

    config = parse(
        PredictionConfig, "fusedacl predict", "Labels and probabilities of texts.", arguments
    )
    from ..inference.prediction import predict

    _quiet_transformers()
    print(f"labels and probabilities are in {predict(config)}")
    return 0


def _exits(arguments: list[str]) -> int:
    from ..config.commands import ExitsConfig

    config = parse(ExitsConfig, "fusedacl exits", "Early exit: sweep, calibrate, store.", arguments)
    from ..inference.calibration.study import study_exits

    _quiet_transformers()
    results = study_exits(config)
    print("\n".join(results["lines"]))
    return 0 if results["complete"] else 130


def _sweep(arguments: list[str]) -> int:
    import argparse
    from pathlib import Path

    from ..config.fields import given
    from ..config.training import TrainingConfig
    from ..experiments.recipe import read_recipe, shipped_recipes
    from ..experiments.sweep import Sweep, SweepStopped

    made = argparse.ArgumentParser(
        prog="fusedacl sweep",
        usage="fusedacl sweep recipe.yaml [--output_dir DIR] [--workers N] [--status]"
        " [--option value ...]",
        description="Run what a recipe describes, one directory a run. Stopped, it goes on where it"
        " was. Any option of `fusedacl train` replaces the recipe's default.",
        epilog=f"Shipped recipes: {', '.join(shipped_recipes())}.",
        allow_abbrev=False,
    )
    made.add_argument("recipe", help="YAML file, or the name of a shipped recipe")
    made.add_argument("--output_dir", type=Path, help="(default: runs/<name of the recipe>)")
    made.add_argument("--workers", type=int, help="runs at a time (default: one for two cores)")
    made.add_argument("--status", action="store_true", help="show how far it is, run nothing")
    options, rest = made.parse_known_args(arguments)
    recipe = read_recipe(options.recipe)
    recipe["defaults"] = {**(recipe.get("defaults") or {}), **given(TrainingConfig, rest)}
    directory = options.output_dir or Path("runs") / Path(options.recipe).stem
    sweep = Sweep(recipe, directory, options.workers)
    if options.status:
        sweep.recall()
    else:
        try:
            sweep.run()
        except SweepStopped as stop:
            print(f"{sweep.table()}\nfusedacl sweep: {stop}", file=sys.stderr)
            return stop.exit_code
    print("\n".join([sweep.table(), *sweep.failures]))
    if not options.status:
        print(f"runs are in {directory}; next: fusedacl report {directory}")
    return 1 if sweep.failures else 0


def _angles(arguments: list[str]) -> int:
    from ..config.commands import AngleConfig

    runs, rest = _runs_first(arguments)
    words = "Angles between the gradients of cross-entropy and contrastive loss of trained runs."
    config = parse(AngleConfig, "fusedacl angles RUN [RUN ...]", words, rest)
    from ..reports.analyses.angle_report import report_angles

    _quiet_transformers()
    table, files = report_angles(runs, config)
    print(f"{table}\nwritten: {', '.join(map(str, files))}")
    return 0


def _tsne(arguments: list[str]) -> int:
    from ..config.commands import TSNEConfig

    runs, rest = _runs_first(arguments)
    words = "Representations of trained runs and their label embeddings: t-SNE, and numbers."
    config = parse(TSNEConfig, "fusedacl tsne RUN [RUN ...]", words, rest)
    from ..reports.analyses.representation_report import report_representations

    _quiet_transformers()
    table, files = report_representations(runs, config)
    print(f"{table}\nwritten: {', '.join(map(str, files))}")
    return 0


def _runs_first(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """The directories that stand before the options, and the rest (a YAML file among it).

    Raises:
        ValueError: there is none, and help is not what is wanted.
    """
    number = 0
    for argument in arguments:
        if argument.startswith("-") or argument.endswith((".yaml", ".yml", ".json")):
            break
        number += 1
    if number == 0 and not {"-h", "--help"} & set(arguments):
        raise ValueError("no run is named: the directories of runs come before the options.")
    return [Path(name) for name in arguments[:number]], arguments[number:]


def _report(arguments: list[str]) -> int:
    import argparse

    parser = argparse.ArgumentParser(
        prog="fusedacl report",
        description="Figures, tables and a page (index.html) of a sweep, or of several runs.",
    )
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="the directory of a sweep, or those of runs; seeds of one method become one line",
    )
    parser.add_argument(
        "--output_dir", type=Path, help="where the files go (default for a sweep: SWEEP/report)"
    )
    parser.add_argument("--metric", help="one of the runs' metrics (default: each task's first)")
    options = parser.parse_args(arguments)
    from ..reports.page.page import Table
    from ..reports.sweep_report import write_report
    from ..runtime.text import markdown_table

    report = write_report(options.paths, options.output_dir, options.metric)
    for section in report.sections:
        for table in section.tables:
            made = table if isinstance(table, Table) else Table(*table)
            print(f"{section.title}\n\n{markdown_table(made.header, made.rows)}\n")
    print("\n".join(report.findings))
    print(f"written: {report.page}, and figures and tables beside it")
    return 0


def _bench(arguments: list[str]) -> int:
    # Nothing but this verb needs the benchmarks.
    from ...benchmarks.cli import main as bench

    return bench(arguments)


def _doctor(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("-h", "--help"):
        print("usage: fusedacl doctor\n\nSays what this machine can run, and why; no options.")
        return 0
    if arguments:
        raise ValueError("doctor takes no arguments: it describes this machine.")
    from .doctor import diagnose

    print("\n".join(diagnose()))
    return 0


def _print_metrics(metrics: dict[str, dict[int, dict[str, float]]]) -> None:
    for split, by_layer in metrics.items():
        for layer, scores in by_layer.items():
            words = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
            print(f"{split}, exit at layer {layer}: {words}")


def _gate_lines(gate: list[dict[str, Any]]) -> list[str]:
    """One line an epoch: what the gate dropped, for each group of parameters it decides on."""
    import statistics

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
            # With a scope there is one group.
            share = rows[0]["agreement_share"]
            lines[-1] += f", the exact decision in {share:.1%} of the {compared} compared"
    return lines


def _quiet_transformers() -> None:
    """No progress bars or advice of transformers and deepspeed among our own lines."""
    import torch

    if not torch.cuda.is_available():
        # Where it is installed, transformers imports deepspeed, which would say that it found none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


_VERBS: dict[str, Callable[[list[str]], Any]] = {
    "train": _train,
    "evaluate": _evaluate,
    "predict": _predict,
    "exits": _exits,
    "sweep": _sweep,
    "angles": _angles,
    "tsne": _tsne,
    "report": _report,
    "bench": _bench,
    "doctor": _doctor,
}
