"""docs/performance.md and the table in README.md from the result files; the figures beside them.

python -m fusedacl.benchmarks.pages.performance benchmarks/results/* --output docs/performance.md \\
    --readme README.md
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ...engine.runtime.files import write_whole
from ...engine.runtime.plots import require_matplotlib
from ..measuring.environment import Result
from ..measuring.result_file import SCHEMA, read_any
from . import exits_and_scaling, growth_figure, roofline, scaling_figure, step_figure
from .cases import cases_section, growth_section
from .headline import headline, write_headline
from .step import step_section

SUITES = ("loss", "angle", "growth", "step", "exits", "scaling")
OWN_SECTIONS: dict[str, Callable[[Result], list[str]]] = {
    "exits": exits_and_scaling.exits_section,
    "scaling": exits_and_scaling.scaling_section,
}
# Files without a schema, from before there was one.
VERSION_0 = OWN_SECTIONS | {
    "loss": exits_and_scaling.loss_section,
    "angle": exits_and_scaling.angle_section,
    "step": exits_and_scaling.step_section,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "directories", nargs="+", type=Path, help="benchmarks/results/<machine>, one or more"
    )
    parser.add_argument("--output", type=Path, required=True, help="the page to write")
    parser.add_argument("--readme", type=Path, help="where the short table goes, between markers")
    arguments = parser.parse_args()
    try:
        results = [read_directory(directory) for directory in arguments.directories]
        draw(arguments.directories, results)
        write_whole(arguments.output, page(arguments.directories, arguments.output.parent))
        if arguments.readme is not None:
            table = headline(arguments.directories, results)
            if table:
                write_headline(arguments.readme, table)
    except ValueError as error:
        print(f"fusedacl.benchmarks.pages.performance: {error}", file=sys.stderr)
        return 2
    return 0


def read_directory(directory: Path) -> dict[str, Result]:
    """The results of one machine by the name of their file.

    Raises:
        ValueError: a file of a schema that this version does not know.
    """
    found = {}
    files = [
        file
        for name in SUITES
        # Some cases of a suite may have a file of their own.
        for file in [directory / f"{name}.json", *sorted(directory.glob(f"{name}_*.json"))]
    ]
    for file in files:
        if not file.is_file():
            continue
        result = read_any(file)
        if result.get("schema", 0) not in (0, SCHEMA):
            raise ValueError(
                f"{str(file)!r} has schema {result['schema']}, this version reads {SCHEMA} and "
                "what came before it: measure it again with this version (fusedacl bench)."
            )
        found[file.stem] = result
    return found


def draw(directories: Sequence[Path], results: Sequence[dict[str, Result]]) -> None:
    """Every figure that the machines' files have numbers for, beside the files."""
    require_matplotlib()
    for directory, found in zip(directories, results, strict=True):
        of_cases = _of_cases(found)
        if any(roofline.points(result) for result in of_cases):
            roofline.draw(of_cases, directory.name, directory)
        if "growth" in found:
            growth_figure.draw(found["growth"], directory.name, directory)
        for name, result in found.items():
            if result.get("figures") and name.startswith("step"):
                step_figure.draw(result, directory, name)
            elif result.get("figures") and name == "scaling":
                scaling_figure.draw(result, directory)


def _of_cases(found: dict[str, Result]) -> list[Result]:
    return [found[name] for name in ("loss", "angle") if "cases" in found.get(name, {})]


def page(directories: Sequence[Path], beside: Path | None = None) -> str:
    """The page of some machines; what was not measured on one is left out there.

    beside: the directory the page is for, from which figures are named.
    """
    results = [read_directory(directory) for directory in directories]
    gpus = sorted(
        {
            result["environment"]["gpu"]
            for found in results
            for result in found.values()
            if "gpu" in result["environment"]
        }
    )
    where = f"On GPUs: {', '.join(gpus)}." if gpus else "Nothing here was measured on a GPU."
    parts = [
        "# Performance",
        "",
        "Made by `python -m fusedacl.benchmarks.pages.performance` from the files in "
        "`benchmarks/results/`; "
        "no number is typed by hand. In each table the contestants took turns in one process; "
        "claims are ratios of medians. What is faster than ours has a number below 1. "
        f"{where}",
    ]
    for directory, found in zip(directories, results, strict=True):
        parts += ["", f"## Machine `{directory.name}`"]
        explained: set[str] = set()
        for name, result in found.items():
            parts += ["", *_section(name, result, directory, beside, explained)]
            parts += ["", _provenance(result["environment"])]
        if any(roofline.points(result) for result in _of_cases(found)):
            file = _link(directory / f"{roofline.NAME}.png", beside)
            parts += ["", f"![Roofline of {directory.name}]({file})"]
    return "\n".join(parts) + "\n"


def _section(
    name: str, result: Result, directory: Path, beside: Path | None, explained: set[str]
) -> list[str]:
    """Lines of one file; `explained`: what earlier files of the machine have explained."""
    if result.get("schema", 0) == 0:
        return VERSION_0[name](result)
    if name == "growth":
        return growth_section(result, _link(directory / f"{growth_figure.NAME}.png", beside))
    if name.startswith("step"):
        figures = result.get("figures")
        figure = _link(directory / figures[0], beside) if figures else None
        is_first = "step" not in explained
        explained.add("step")
        return step_section(result, figure, is_first)
    if name in OWN_SECTIONS:
        return OWN_SECTIONS[name](result)
    return cases_section(result)


def _link(file: Path, beside: Path | None) -> str:
    if beside is None:
        return f"../benchmarks/results/{file.parent.name}/{file.name}"
    return Path(os.path.relpath(file, beside)).as_posix()


def _provenance(environment: Result) -> str:
    threads = environment["threads"]
    return (
        f"{environment['cpu']}, {environment['cores']} cores, "
        f"{threads} thread{'' if threads == 1 else 's'}; "
        f"torch {environment['torch']}, Python {environment['python']}, "
        f"pytorch-metric-learning {environment['pytorch_metric_learning']}; commit "
        f"{environment['commit']}, {environment['date']}; load average before: "
        f"{environment['load_average'][0]:.1f}."
    )


if __name__ == "__main__":
    sys.exit(main())
