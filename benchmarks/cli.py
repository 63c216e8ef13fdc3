"""The command `fusedacl bench`, also `python -m fusedacl.benchmarks`."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..engine.config.fields import build, parse
from ..engine.runtime import processes
from ..engine.runtime.plots import require_matplotlib
from ..engine.runtime.text import did_you_mean, text_table
from .floors import cpu
from .floors.rates import DTYPE_NAMES, Rates
from .measuring.environment import CPU
from .measuring.memory import Child
from .measuring.result_file import ResultFile, read_result
from .options import (
    SKIPPED,
    BenchConfig,
    ExitsConfig,
    LoopsConfig,
    RankRun,
    ScalingConfig,
    StepConfig,
    WiderConfig,
    names_of,
    output_directory,
    refuse_other_sizes,
    sizes,
)
from .suites import growth
from .suites.gate import suite as angle
from .suites.gate.case import AngleCase
from .suites.loss import suite as loss
from .suites.loss.case import LOSSES, LossCase
from .suites.runner import Settings, refuse_what_cannot_fit, run_cases
from .suites.suite import Suite, WrongResult

DESCRIPTIONS = {
    "loss": "Time and memory of the contrastive loss, forward + backward.",
    "angle": "Time and memory of the gradient-angle check and the gated combination.",
    "growth": "Series along M, d, K, E and the number of parameters, with fitted exponents.",
    "step": "Time, memory and parts of a training step, float32 on the CPU.",
    "loops": "Time of a step with the gate under DistributedDataParallel and FSDP2, 2 ranks.",
    "wider": "Time of losses with learned temperatures, several labels per row, or a memory.",
    "exits": "Time of training several exits, and of early exit if no text leaves early.",
    "scaling": "Cost of negatives from all ranks: measured on loopback, modelled up to 4096 ranks.",
    "all": "Every suite, one after another; each writes a file.",
    "report": "Pages with the tables and figures of all result files.",
    "compare": "Changes between two result files, or commits (--commits A B), beyond the noise.",
}
_LINES = "\n".join(f"  {suite:<10} {words}" for suite, words in DESCRIPTIONS.items())
USAGE = f"""usage: fusedacl bench <suite> [config.yaml] [--option value …]

{_LINES}

fusedacl bench <suite> --help explains each option; --preset quick takes minutes for all."""

SUITES: dict[str, Suite] = {"loss": loss.SUITE, "angle": angle.SUITE}
CASES: dict[str, Callable[..., list[Any]]] = {"loss": loss.cases, "angle": angle.cases}
# Limit of `case_seconds` for each point of a series, because there are many points.
POINT_SECONDS = 4.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a suite; returns 0, 1 (a result of ours is wrong) or 2 (a mistake in the arguments)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    suite, *rest = arguments
    try:
        if suite not in DESCRIPTIONS:
            raise ValueError(f"There is no suite {suite!r}.{did_you_mean(suite, DESCRIPTIONS)}")
        if suite in ("all", "compare", "report"):
            return {"all": _all, "compare": _compare, "report": _report}[suite](rest)
        cls, run = RUNS[suite]
        return _status(suite, partial(run, _parse(cls, suite, rest)))
    except ValueError as error:
        print(f"fusedacl bench {suite}: {error}", file=sys.stderr)
        return 2


def _parse(cls: type, suite: str, arguments: list[str]) -> Any:
    # --quick is short for --preset quick.
    words = [part for word in arguments for part in (
        ("--preset", "quick") if word == "--quick" else (word,)
    )]  # fmt: skip
    return parse(cls, f"fusedacl bench {suite}", DESCRIPTIONS[suite], words)


def _status(suite: str, run: Callable[[], int]) -> int:
    try:
        return run()
    except WrongResult as error:
        print(f"fusedacl bench {suite}: {error}", file=sys.stderr)
        return 1


def _known_providers(suite: str, device: torch.device) -> list[str]:
    """Names of the providers of a suite; of loss and angle for `all`."""
    if suite == "growth":
        return [*dict.fromkeys(growth.LOSS_PROVIDERS + growth.ANGLE_PROVIDERS)]
    cases: list[tuple[Suite, Any]] = []
    if suite != "angle":
        cases += [(loss.SUITE, LossCase(kind, 4, 8, 2)) for kind in LOSSES]
    if suite != "loss":
        cases += [(angle.SUITE, AngleCase(task, 1000)) for task in angle.TASKS]
    found = [provider.name for each, case in cases for provider in each.providers(case, device)]
    return list(dict.fromkeys(found))


def _run_cases(suite: str, config: BenchConfig, known: Sequence[str] | None = None) -> int:
    """bench loss, bench angle and bench growth; known: names of providers that may be given."""
    how = config.how
    if suite == "growth" and known is None:
        refuse_other_sizes(config)
    with Child(how.threads) as child:
        chosen = sizes(config)
        known = known or _known_providers(suite, torch.device(how.device))
        names = names_of("providers", config.what.providers, known)
        settings = Settings(
            torch.device(how.device), chosen["rounds"], chosen["case_seconds"], names,
            SKIPPED[how.preset], child if how.peaks else None, busy_core=suite in SUITES,
        )  # fmt: skip
        cases: list[Any] = []
        if suite in SUITES:
            cases = CASES[suite](chosen)
            refuse_what_cannot_fit(SUITES[suite], cases, settings)
        file = _begin(suite, config, settings.device, cases=[])
        rates = _measure_machine(file, settings)
        if suite in SUITES:
            return _finish(file, run_cases(SUITES[suite], cases, settings, file, rates))
        file.result["growth"] = []
        series = growth.all_series(how.device, how.preset, chosen["dtypes"][0], config.what.samples)
        return _finish(file, _run_series(series, settings, file, rates))


def _run_series(
    all_series: Sequence[growth.Series], settings: Settings, file: ResultFile, rates: Rates
) -> list[str]:
    """Run the points of every series, until the device is lost; returns failures of ours.

    Series in which none of the named providers takes part are left out.
    """
    failures = []
    for series in all_series:
        names = tuple(name for name in series.providers if name in settings.providers)
        if settings.providers and not names:
            continue
        of_series = replace(
            settings,
            providers=names or series.providers,
            case_seconds=min(settings.case_seconds, POINT_SECONDS),
        )
        labels = [{"axis": series.axis, "size": size} for size in series.sizes]
        failures += run_cases(series.suite, series.cases, of_series, file, rates, labels)
        file.result["growth"] = growth.fits(file.result["cases"])
        if "stopped" in file.result:
            break
    print("\n" + growth.fit_table(file.result["growth"], text_table))
    return failures


def _measure_machine(file: ResultFile, settings: Settings) -> Rates:
    """Measure the machine's rates, print them and add them to the file."""
    if settings.device == CPU:
        rates = cpu.measured()
    else:
        try:
            from .floors import gpu
        except ImportError as error:
            raise ValueError(
                f"device={str(settings.device)!r}: {error}. Run: pip install triton"
            ) from error
        rates = gpu.measured(settings.device)
    file.result["rates"] = rates.record()
    products = ", ".join(
        f"{DTYPE_NAMES[dtype]} {value / 1e9:.0f} GFLOP/s" for dtype, value in rates.flops.items()
    )
    print(
        f"{rates.name}: {products}; {rates.exponentials / 1e9:.2f} Gexp/s; "
        f"{rates.bytes / 1e9:.1f} GB/s"
    )
    return rates


def _run_step(config: StepConfig) -> int:
    from .pages import step_figure
    from .suites.step.suite import PRESETS, run

    providers, cases = config.names()
    require_matplotlib()
    file = _begin("step", config, name="_".join(("step", *cases)))
    try:
        run(
            PRESETS[config.how.preset], file,
            providers=providers, cases=cases, threads=config.how.threads,
        )  # fmt: skip
    finally:
        processes.leave()
    status = _finish(file, [])
    step_figure.draw(file.result, file.path.with_suffix(""))
    return status


def _run_preset(suite: str, config: LoopsConfig | WiderConfig) -> int:
    """bench loops and bench wider."""
    run = import_module(f".suites.{suite}.suite", __package__).run
    file = _begin(suite, config)
    run(file, preset=config.how.preset, threads=config.how.threads)
    return _finish(file, [])


def _run_exits(config: ExitsConfig) -> int:
    from .suites.exits.suite import real_texts, run

    quick, data_dir = config.how.preset == "quick", config.what.data_dir
    file = _begin("exits", config)
    texts = Path(data_dir) if data_dir else None if quick else real_texts()
    run(file, quick=quick, data_dir=texts, threads=config.how.threads)
    return _finish(file, [])


def _run_scaling(config: ScalingConfig) -> int:
    from .pages import scaling_figure
    from .pages.scaling import model_section, scaling_section
    from .suites.scaling.suite import run

    problem, ranks = config.problem_and_ranks()
    described = config.described_machine(problem)
    require_matplotlib()
    file = _begin("scaling", config)
    run(file, problem, ranks, config.model.memory_budget_gb * 1e9, described)
    print("\n".join([*scaling_section(file.result), "", *model_section(file.result)]))
    status = _finish(file, [])
    scaling_figure.draw(file.result, file.path.with_suffix(""))
    return status


def _begin(
    suite: str, config: Any, device: torch.device = CPU, name: str | None = None, **more: Any
) -> ResultFile:
    """Begin a result file, which names the threads that the suite is to have."""
    torch.set_num_threads(config.how.threads)
    path = output_directory(config) / f"{name or suite}.json"
    return ResultFile(path, suite, config.how.preset, device, **more)


def _finish(file: ResultFile, failures: list[str]) -> int:
    file.save()
    found = file.result["noise"]
    print(f"\nspread {found['spread']:.1%} (20th to 80th percentile, typical)", end="")
    print(f"; NOISY: {'; '.join(found['why'])}" if found["noisy"] else "")
    print(f"written: {file.path}")
    for failure in failures:
        print(f"fusedacl bench: {failure}", file=sys.stderr)
    return 1 if failures else 0


# Suite -> class of its options, and what runs it.
RUNS: dict[str, tuple[type, Callable[..., int]]] = {
    **{suite: (BenchConfig, partial(_run_cases, suite)) for suite in ("loss", "angle", "growth")},
    "step": (StepConfig, _run_step),
    "loops": (LoopsConfig, partial(_run_preset, "loops")),
    "wider": (WiderConfig, partial(_run_preset, "wider")),
    "exits": (ExitsConfig, _run_exits),
    "scaling": (ScalingConfig, _run_scaling),
}


def _all(arguments: list[str]) -> int:
    config = _parse(BenchConfig, "all", arguments)
    device = torch.device(config.how.device)
    known = _known_providers("all", device)
    named = set(names_of("providers", config.what.providers, known))
    shared = {"preset": config.how.preset, "output_dir": config.how.output_dir}
    threads = {"threads": config.how.threads}
    runs: dict[str, Callable[[], int]] = {}
    for suite, (cls, run) in RUNS.items():
        if cls is not BenchConfig and device != CPU:
            print(f"\nbench {suite} measures the CPU: left out with --device {device}.")
        elif cls is not BenchConfig:
            # A suite with ranks counts threads per rank, and keeps its own number.
            own = {} if isinstance(cls().how, RankRun) else threads
            runs[suite] = partial(run, build(cls, shared | own))
        elif named and not named & set(_known_providers(suite, device)):
            print(f"\nbench {suite}: none of the named providers takes part, left out.")
        else:
            runs[suite] = partial(run, config, known)
    statuses, seconds = [0], {}
    for suite, measure in runs.items():
        print(f"\nBENCH {suite.upper()}", flush=True)
        start = time.monotonic()
        statuses.append(_status(suite, measure))
        seconds[suite] = time.monotonic() - start
    took = ", ".join(f"{suite} {each:.0f} s" for suite, each in seconds.items())
    print(f"\nbench all took {sum(seconds.values()):.0f} s: {took}")
    return max(statuses)


def _report(arguments: list[str]) -> int:
    from .pages.performance import main as write

    return write(arguments)


def _compare(arguments: list[str]) -> int:
    from .comparing.commits import compare_commits
    from .comparing.files import compare

    parser = argparse.ArgumentParser(
        prog="fusedacl bench compare",
        description=f"{DESCRIPTIONS['compare']} With --commits the suite runs here from both "
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
        if _parse(BenchConfig, options.suite, rest).how.output_dir is not None:
            raise ValueError("output_dir: the runs of --commits leave no files; leave it out.")
        # The runs have a working directory of their own, so a configuration file needs its path.
        for at, (before, word) in enumerate(zip(["", *rest], rest, strict=False)):
            if not before.startswith("--") and Path(word).is_file():
                rest[at] = str(Path(word).resolve())
        print(compare_commits(options.commits, options.suite, rest, options.repeats))
        return 0
    if rest:
        raise ValueError(f"Unknown argument {rest[0]!r}: the options of a suite need --commits.")
    if len(options.files) != 2:
        raise ValueError(f"{len(options.files)} file(s) given: name two result files, OLD and NEW.")
    old, new = options.files
    print(compare(read_result(old), read_result(new), names=(str(old), str(new))))
    return 0
