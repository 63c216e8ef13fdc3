"""The command `fusedacl bench`, also `python -m fusedacl.benchmarks`."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..engine.config.fields import parse
from ..engine.runtime.plots import require_matplotlib
from ..engine.runtime.text import did_you_mean
from .floors.machine import measured
from .floors.rates import DTYPE_NAMES, Rates, rates_result
from .measuring.environment import CPU
from .measuring.memory import Child
from .measuring.result_file import ResultFile
from .options import BenchConfig, output_directory, provider_names, settings_of, sizes
from .suites import growth
from .suites.gate import suite as angle
from .suites.gate.case import AngleCase
from .suites.loss import suite as loss
from .suites.loss.case import LOSSES, LossCase
from .suites.runner import Settings, refuse_what_cannot_fit, run_cases
from .suites.suite import Suite

USAGE = """usage: fusedacl bench <suite> [config.yaml] [--option value …]

  loss       the contrastive loss, forward + backward, beside what one would use instead
  angle      the gradient-angle check and the gated combination
  growth     how time and memory grow with M, d, K, E and the number of parameters
  step       a training step
  exits      many exits together, early exit
  scaling    negatives of all ranks
  all        all of these
  compare    two result files, or two commits (--commits A B): what changed, what is noise

fusedacl bench <suite> --help explains each option; --preset quick takes minutes for all."""

MADE: dict[str, Suite] = {"loss": loss.SUITE, "angle": angle.SUITE}
# Of timing a point of a series; there are many.
POINT_SECONDS = 4.0
OWN_COMMAND_LINE = ("step", "exits", "scaling")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one suite; returns the exit status: 0, 1 (something of ours failed), 2 (a mistake)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    try:
        return run(arguments[0], arguments[1:])
    except ValueError as error:
        print(f"fusedacl bench {arguments[0]}: {error}", file=sys.stderr)
        return 2


def run(suite: str, arguments: list[str]) -> int:
    """`main` without the last word on mistakes.

    Raises:
        ValueError: a mistake in the arguments.
    """
    if suite not in _SUITES:
        raise ValueError(f"There is no suite {suite!r}.{did_you_mean(suite, _SUITES)}")
    return _SUITES[suite](arguments)


def _parse(suite: str, words: str, arguments: list[str]) -> BenchConfig:
    return parse(BenchConfig, f"fusedacl bench {suite}", words, arguments)


def _prepared(
    config: BenchConfig, known: list[str], child: Child
) -> tuple[dict[str, Any], Settings]:
    """Sizes and settings; the number of threads is set."""
    chosen = sizes(config)
    settings = settings_of(config, chosen, provider_names(config.what.providers, known), child)
    torch.set_num_threads(settings.threads)
    return chosen, settings


def _known(suites: Sequence[str], device: torch.device) -> list[str]:
    """Names of all providers of suites, in their order."""
    cases: list[tuple[Suite, Any]] = []
    if "loss" in suites:
        cases += [(loss.SUITE, LossCase(kind, 4, 8, 2)) for kind in LOSSES]
    if "angle" in suites:
        cases += [(angle.SUITE, AngleCase(task, 1000)) for task in angle.TASKS]
    found = [provider.name for suite, case in cases for provider in suite.providers(case, device)]
    return list(dict.fromkeys(found))


def _cases(suite: str, config: BenchConfig, chosen: dict[str, Any]) -> list[Any]:
    if suite == "angle":
        return list(
            angle.cases(
                tasks=chosen["tasks"], parameters=chosen["parameters"], dtypes=chosen["dtypes"]
            )
        )
    names = ("losses", "rows", "widths", "classes", "exits", "dtypes")
    return list(loss.cases(samples=config.what.samples, **{name: chosen[name] for name in names}))


def _of_cases(suite: str, config: BenchConfig, known: Sequence[str] | None = None) -> int:
    """bench loss, bench angle."""
    known = list(known or _known([suite], torch.device(config.how.device)))
    with Child(config.how.threads) as child:
        chosen, settings = _prepared(config, known, child)
        cases = _cases(suite, config, chosen)
        made = MADE[suite]
        refuse_what_cannot_fit(made, cases, settings)
        path = output_directory(config) / f"{suite}.json"
        file = ResultFile(path, suite, config.how.preset, settings.device, cases=[])
        rates = _machine(file, settings)
        return _finished(file, run_cases(made, cases, settings, file, rates))


def _machine(file: ResultFile, settings: Settings) -> Rates:
    """The machine's rates, measured and kept in the file."""
    try:
        rates = measured(settings.device)
    except ImportError as error:
        raise ValueError(
            f"device={str(settings.device)!r}: {error}. Run: pip install triton"
        ) from error
    file.result["rates"] = rates_result(rates)
    products = ", ".join(
        f"{DTYPE_NAMES[dtype]} {value / 1e9:.0f} GFLOP/s" for dtype, value in rates.flops.items()
    )
    print(
        f"{rates.name}: {products}; {rates.exponentials / 1e9:.2f} Gexp/s; "
        f"{rates.bytes / 1e9:.1f} GB/s"
    )
    return rates


def _growth(config: BenchConfig, known: Sequence[str] | None = None) -> int:
    how = config.how
    known = list(known or _known(["loss", "angle"], torch.device(how.device)))
    with Child(how.threads) as child:
        chosen, settings = _prepared(config, known, child)
        path = output_directory(config) / "growth.json"
        file = ResultFile(path, "growth", how.preset, settings.device, cases=[])
        rates = _machine(file, settings)
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
    print("\n" + "\n".join(growth.sentences(file.result["growth"])))
    return _finished(file, failures)


def _finished(file: ResultFile, failures: list[str]) -> int:
    file.save()
    found = file.result["noise"]
    print(f"\nspread {found['spread']:.1%} (20th to 80th percentile, typical)", end="")
    print(f"; NOISY: {'; '.join(found['why'])}" if found["noisy"] else "")
    print(f"written: {file.path}")
    for failure in failures:
        print(f"fusedacl bench: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _elsewhere(suite: str, arguments: list[str]) -> int:
    """The suites that have command lines of their own; --preset is theirs too."""
    if suite == "scaling":
        require_matplotlib()
    words, rest = [], list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--preset" and rest and rest[0] in ("quick", "full"):
            words += ["--quick"] if rest.pop(0) == "quick" else []
        else:
            words.append(word)
    before, sys.argv = sys.argv, [f"fusedacl bench {suite}", *words]
    try:
        import_module(f".suites.{suite}.suite", __package__).main()
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(f"fusedacl bench {suite}: {stop.code}", file=sys.stderr)
            return 1
        return stop.code or 0
    finally:
        sys.argv = before
    return 0


def _all(arguments: list[str]) -> int:
    config = _parse("all", "Every suite, one after the other; each leaves a file.", arguments)
    device = torch.device(config.how.device)
    known = _known(["loss", "angle"], device)
    named = provider_names(config.what.providers, known)
    statuses: list[int] = []
    seconds: dict[str, float] = {}
    for suite in ("loss", "angle", "growth"):
        own = _known(["loss", "angle"] if suite == "growth" else [suite], device)
        if named and not set(named) & set(own):
            print(f"\nbench {suite}: none of the named providers takes part, left out.")
            continue
        with _timed(suite, seconds):
            statuses.append(
                _growth(config, known) if suite == "growth" else _of_cases(suite, config, known)
            )
    for suite in OWN_COMMAND_LINE:
        if device != CPU:
            print(f"\nbench {suite} measures the CPU: left out with --device {device}.")
            continue
        options = ["--preset", config.how.preset]
        if config.how.output_dir is not None:
            options += ["--output_dir", config.how.output_dir]
        with _timed(suite, seconds):
            statuses.append(_elsewhere(suite, options))
    took = ", ".join(f"{suite} {each:.0f} s" for suite, each in seconds.items())
    print(f"\nbench all took {sum(seconds.values()):.0f} s: {took}")
    return max(statuses, default=0)


@contextmanager
def _timed(suite: str, seconds: dict[str, float]) -> Iterator[None]:
    print(f"\nBENCH {suite.upper()}", flush=True)
    start = time.monotonic()
    yield
    seconds[suite] = time.monotonic() - start


def _compare(arguments: list[str]) -> int:
    from .comparing.commits import compare_commits
    from .comparing.files import compare_files

    parser = argparse.ArgumentParser(
        prog="fusedacl bench compare",
        description="What changed between two result files, or between two commits: of each time "
        "the ratio of medians, and whether it is more than noise. With --commits the suite is run "
        "here from both, in turns; its options follow.",
        allow_abbrev=False,
    )
    # With --commits what is not said here is the suite's, and its values are no files.
    of_commits = "--commits" in arguments
    if of_commits or {"-h", "--help"} & set(arguments):
        parser.add_argument("--commits", nargs=2, metavar=("OLD", "NEW"), help="in place of files")
        parser.add_argument("--suite", choices=tuple(MADE), default="loss", help="(default: loss)")
        parser.add_argument("--repeats", type=int, default=2, help="runs of each (default: 2)")
    if not of_commits:
        parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="OLD and NEW")
    options, rest = parser.parse_known_args(arguments)
    if of_commits:
        if options.repeats < 1:
            raise ValueError(f"repeats={options.repeats}: each commit is run once at least.")
        # A mistake in them is found here, not after two trees were laid out.
        _parse(options.suite, "", rest)
        print(compare_commits(options.commits, options.suite, rest, options.repeats))
        return 0
    if rest:
        raise ValueError(f"Unknown argument {rest[0]!r}: the options of a suite need --commits.")
    if len(options.files) != 2:
        raise ValueError(f"two files are compared, {len(options.files)} given: OLD NEW.")
    print(compare_files(*options.files))
    return 0


def _loss(arguments: list[str]) -> int:
    words = "Time and memory of the contrastive loss, forward + backward."
    return _of_cases("loss", _parse("loss", words, arguments))


def _angle(arguments: list[str]) -> int:
    words = "Time and memory of the gradient-angle check and the gated combination."
    return _of_cases("angle", _parse("angle", words, arguments))


def _grows(arguments: list[str]) -> int:
    words = "Series along M, d, K, E and the parameters, with fitted exponents."
    return _growth(_parse("growth", words, arguments))


_SUITES: dict[str, Callable[[list[str]], int]] = {
    "loss": _loss,
    "angle": _angle,
    "growth": _grows,
    **{suite: partial(_elsewhere, suite) for suite in OWN_COMMAND_LINE},
    "all": _all,
    "compare": _compare,
}
