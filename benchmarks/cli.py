"""The command `fusedacl bench`, also `python -m fusedacl.benchmarks`."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..engine.config.fields import build, parse
from ..engine.runtime import processes
from ..engine.runtime.plots import require_matplotlib
from ..engine.runtime.text import did_you_mean, text_table
from .floors.machine import measured
from .floors.rates import DTYPE_NAMES, Rates
from .measuring.environment import CPU
from .measuring.memory import Child
from .measuring.result_file import ResultFile
from .options import (
    BenchConfig,
    ExitsConfig,
    ScalingConfig,
    StepConfig,
    names_of,
    output_directory,
    settings_of,
    sizes,
)
from .suites import growth
from .suites.gate import suite as angle
from .suites.gate.case import AngleCase
from .suites.loss import suite as loss
from .suites.loss.case import LOSSES, LossCase
from .suites.runner import Settings, refuse_what_cannot_fit, run_cases
from .suites.suite import Suite, WrongResult

USAGE = """usage: fusedacl bench <suite> [config.yaml] [--option value …]

  loss       the contrastive loss, forward + backward, beside the alternatives
  angle      the gradient-angle check and the gated combination, beside the alternatives
  growth     growth of time and memory with M, d, K, E and the number of parameters
  step       a training step, beside the Hugging Face Trainer
  exits      training several exits together, and early exit
  scaling    negatives from all ranks
  all        all of these
  compare    changes between two result files, or two commits (--commits A B), beyond the noise

fusedacl bench <suite> --help explains each option; --preset quick takes minutes for all."""

SUITES: dict[str, Suite] = {"loss": loss.SUITE, "angle": angle.SUITE}
# Limit of `case_seconds` for each point of a series, because there are many points.
POINT_SECONDS = 4.0

Config = TypeVar("Config")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a suite; returns 0, 1 (a result of ours is wrong) or 2 (a mistake in the arguments)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    suite = arguments[0]
    try:
        if suite not in COMMANDS:
            raise ValueError(f"There is no suite {suite!r}.{did_you_mean(suite, COMMANDS)}")
        return COMMANDS[suite](arguments[1:])
    except ValueError as error:
        print(f"fusedacl bench {suite}: {error}", file=sys.stderr)
        return 2


def _parse(cls: type[Config], suite: str, description: str, arguments: list[str]) -> Config:
    # --quick is short for --preset quick.
    words = [part for word in arguments for part in (
        ("--preset", "quick") if word == "--quick" else (word,)
    )]  # fmt: skip
    return parse(cls, f"fusedacl bench {suite}", description, words)


def _prepare(
    config: BenchConfig, known: list[str], child: Child
) -> tuple[dict[str, Any], Settings]:
    """Sizes and settings; sets the number of threads."""
    chosen = sizes(config)
    settings = settings_of(
        config, chosen, names_of("providers", config.what.providers, known), child
    )
    torch.set_num_threads(settings.threads)
    return chosen, settings


def _known_providers(suites: Sequence[str], device: torch.device) -> list[str]:
    cases: list[tuple[Suite, Any]] = []
    if "loss" in suites:
        cases += [(loss.SUITE, LossCase(kind, 4, 8, 2)) for kind in LOSSES]
    if "angle" in suites:
        cases += [(angle.SUITE, AngleCase(task, 1000)) for task in angle.TASKS]
    found = [provider.name for suite, case in cases for provider in suite.providers(case, device)]
    return list(dict.fromkeys(found))


def _cases(suite: str, config: BenchConfig, chosen: dict[str, Any]) -> list[Any]:
    if suite == "angle":
        names: tuple[str, ...] = ("tasks", "parameters", "dtypes")
        return list(angle.cases(**{name: chosen[name] for name in names}))
    names = ("losses", "rows", "widths", "classes", "exits", "dtypes")
    return list(loss.cases(samples=config.what.samples, **{name: chosen[name] for name in names}))


def _run_cases(suite: str, config: BenchConfig, known: Sequence[str] | None = None) -> int:
    """bench loss, bench angle."""
    known = list(known or _known_providers([suite], torch.device(config.how.device)))
    with Child(config.how.threads) as child:
        chosen, settings = _prepare(config, known, child)
        cases = _cases(suite, config, chosen)
        refuse_what_cannot_fit(SUITES[suite], cases, settings)
        path = output_directory(config) / f"{suite}.json"
        file = ResultFile(path, suite, config.how.preset, settings.device, cases=[])
        rates = _measure_machine(file, settings)
        return _finish(file, run_cases(SUITES[suite], cases, settings, file, rates))


def _measure_machine(file: ResultFile, settings: Settings) -> Rates:
    """Measure the machine's rates, print them and add them to the file."""
    try:
        rates = measured(settings.device)
    except ImportError as error:
        raise ValueError(
            f"device={str(settings.device)!r}: {error}. Run: pip install triton"
        ) from error
    file.result["rates"] = rates.record()
    products = ", ".join(
        f"{DTYPE_NAMES[dtype]} {value / 1e9:.0f} GFLOP/s" for dtype, value in rates.flops.items()
    )
    print(
        f"{rates.name}: {products}; {rates.exponentials / 1e9:.2f} Gexp/s; "
        f"{rates.bytes / 1e9:.1f} GB/s"
    )
    return rates


def _run_growth(config: BenchConfig, known: Sequence[str] | None = None) -> int:
    how = config.how
    known = list(known or _known_providers(["loss", "angle"], torch.device(how.device)))
    with Child(how.threads) as child:
        chosen, settings = _prepare(config, known, child)
        path = output_directory(config) / "growth.json"
        file = ResultFile(path, "growth", how.preset, settings.device, cases=[])
        rates = _measure_machine(file, settings)
        failures = []
        for series in growth.all_series(
            how.device, how.preset, chosen["dtypes"][0], config.what.samples
        ):
            names = tuple(name for name in series.providers if name in settings.providers)
            of_series = replace(
                settings,
                providers=names or series.providers,
                case_seconds=min(settings.case_seconds, POINT_SECONDS),
            )
            labels = [{"axis": series.axis, "size": size} for size in series.sizes]
            failures += run_cases(series.suite, series.cases, of_series, file, rates, labels)
            if "stopped" in file.result:
                break
    file.result["growth"] = growth.fits(file.result["cases"])
    print("\n" + growth.fit_table(file.result["growth"], text_table))
    return _finish(file, failures)


def _run_step(config: StepConfig) -> int:
    from .pages import step_figure
    from .suites.step.suite import PRESETS, run

    providers, cases = config.names()
    require_matplotlib()
    name = "_".join(("step", *cases))
    file = ResultFile(output_directory(config) / f"{name}.json", "step", config.how.preset)
    try:
        run(
            PRESETS[config.how.preset], file,
            providers=providers, cases=cases, threads=config.how.threads,
        )  # fmt: skip
    except WrongResult as error:
        return _refuse("step", error)
    finally:
        processes.leave()
    step_figure.draw(file.result, file.path.with_suffix(".png"))
    return _finish(file, [])


def _run_exits(config: ExitsConfig) -> int:
    from .suites.exits.suite import real_texts, run

    quick, data_dir = config.how.preset == "quick", config.what.data_dir
    file = ResultFile(output_directory(config) / "exits.json", "exits", config.how.preset)
    texts = Path(data_dir) if data_dir else None if quick else real_texts()
    try:
        run(file, quick=quick, data_dir=texts, threads=config.how.threads)
    except WrongResult as error:
        return _refuse("exits", error)
    return _finish(file, [])


def _run_scaling(config: ScalingConfig) -> int:
    from .pages import scaling_figure
    from .pages.scaling import model_section, scaling_section
    from .suites.scaling.suite import run

    problem, ranks = config.problem_and_ranks()
    described = config.described_machine(problem)
    require_matplotlib()
    file = ResultFile(output_directory(config) / "scaling.json", "scaling", config.how.preset)
    try:
        run(file, problem, ranks, config.model.memory_budget_gb * 1e9, described)
    except WrongResult as error:
        return _refuse("scaling", error)
    scaling_figure.draw(file.result, file.path.with_suffix(".png"))
    print("\n".join([*scaling_section(file.result), "", *model_section(file.result)]))
    return _finish(file, [])


def _refuse(suite: str, error: WrongResult) -> int:
    print(f"fusedacl bench {suite}: {error}", file=sys.stderr)
    return 1


def _finish(file: ResultFile, failures: list[str]) -> int:
    file.save()
    found = file.result["noise"]
    print(f"\nspread {found['spread']:.1%} (20th to 80th percentile, typical)", end="")
    print(f"; NOISY: {'; '.join(found['why'])}" if found["noisy"] else "")
    print(f"written: {file.path}")
    for failure in failures:
        print(f"fusedacl bench: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _all(arguments: list[str]) -> int:
    config = _parse(BenchConfig, "all", DESCRIPTIONS["all"], arguments)
    device = torch.device(config.how.device)
    known = _known_providers(["loss", "angle"], device)
    named = names_of("providers", config.what.providers, known)
    shared = {"preset": config.how.preset, "output_dir": config.how.output_dir}
    runs: dict[str, Callable[[], int]] = {}
    for suite in ("loss", "angle", "growth"):
        own = _known_providers(["loss", "angle"] if suite == "growth" else [suite], device)
        if named and not set(named) & set(own):
            print(f"\nbench {suite}: none of the named providers takes part, left out.")
        elif suite == "growth":
            runs[suite] = partial(_run_growth, config, known)
        else:
            runs[suite] = partial(_run_cases, suite, config, known)
    for suite, (cls, run) in CPU_SUITES.items():
        if device == CPU:
            runs[suite] = partial(run, build(cls, shared))
        else:
            print(f"\nbench {suite} measures the CPU: left out with --device {device}.")
    statuses, seconds = [0], {}
    for suite, measure in runs.items():
        print(f"\nBENCH {suite.upper()}", flush=True)
        start = time.monotonic()
        statuses.append(measure())
        seconds[suite] = time.monotonic() - start
    took = ", ".join(f"{suite} {each:.0f} s" for suite, each in seconds.items())
    print(f"\nbench all took {sum(seconds.values()):.0f} s: {took}")
    return max(statuses)


def _compare(arguments: list[str]) -> int:
    from .comparing.commits import compare_commits
    from .comparing.files import compare_files

    parser = argparse.ArgumentParser(
        prog="fusedacl bench compare",
        description="Changes between two result files or two commits: the ratio of medians of each "
        "time, and whether it is more than noise. With --commits the suite runs here from both "
        "commits in turns; its options follow.",
        allow_abbrev=False,
    )
    # With --commits, all other arguments are the suite's options, whose values are not files.
    from_commits = "--commits" in arguments
    if from_commits or {"-h", "--help"} & set(arguments):
        parser.add_argument("--commits", nargs=2, metavar=("OLD", "NEW"), help="in place of files")
        parser.add_argument(
            "--suite", choices=tuple(SUITES), default="loss", help="(default: loss)"
        )
        parser.add_argument("--repeats", type=int, default=2, help="runs per commit (default: 2)")
    if not from_commits:
        parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="OLD and NEW")
    options, rest = parser.parse_known_args(arguments)
    if from_commits:
        if options.repeats < 1:
            raise ValueError(f"repeats={options.repeats}: each commit must run once at least.")
        # Finds mistakes before two trees are laid out.
        _parse(BenchConfig, options.suite, "", rest)
        print(compare_commits(options.commits, options.suite, rest, options.repeats))
        return 0
    if rest:
        raise ValueError(f"Unknown argument {rest[0]!r}: the options of a suite need --commits.")
    if len(options.files) != 2:
        raise ValueError(f"two files are compared, {len(options.files)} given: OLD NEW.")
    print(compare_files(*options.files))
    return 0


DESCRIPTIONS = {
    "loss": "Time and memory of the contrastive loss, forward + backward.",
    "angle": "Time and memory of the gradient-angle check and the gated combination.",
    "growth": "Series along M, d, K, E and the number of parameters, with fitted exponents.",
    "step": "Time, memory and parts of a training step, float32 on the CPU.",
    "exits": "Time of training several exits, and of early exit if no text leaves early.",
    "scaling": "Cost of negatives from all ranks: measured on loopback, modelled up to 4096 ranks.",
    "all": "Every suite, one after another; each writes a file.",
}
CPU_SUITES: dict[str, tuple[type, Callable[[Any], int]]] = {
    "step": (StepConfig, _run_step),
    "exits": (ExitsConfig, _run_exits),
    "scaling": (ScalingConfig, _run_scaling),
}


def _command(suite: str, cls: type, run: Callable[[Any], int]) -> Callable[[list[str]], int]:
    return lambda arguments: run(_parse(cls, suite, DESCRIPTIONS[suite], arguments))


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    **{suite: _command(suite, BenchConfig, partial(_run_cases, suite)) for suite in SUITES},
    "growth": _command("growth", BenchConfig, _run_growth),
    **{suite: _command(suite, cls, run) for suite, (cls, run) in CPU_SUITES.items()},
    "all": _all,
    "compare": _compare,
}
