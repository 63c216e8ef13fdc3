"""docs/performance.md, the page of the scaling model, the README's table and all figures.

    fusedacl bench report
    python -m fusedacl.benchmarks.pages.performance benchmarks/results/* --readme README.md

Result files of every machine are folded in, those of sessions on a GPU too.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ...engine.runtime.files import write_whole
from ...engine.runtime.plots import require_matplotlib
from ..measuring.environment import Result
from ..measuring.result_file import read_result
from . import growth_figure, roofline, scaling_figure, step_figure
from .cases import cases_section, growth_section
from .exits import exits_section
from .headline import headline, write_headline
from .scaling import MODEL_PAGE, model_page, scaling_section
from .session import session_section, steps_section
from .step import step_section
from .summary import introduction
from .times import loops_section, wider_section

SUITES = (
    "session",
    "loss",
    "angle",
    "growth",
    "step",
    "steps",
    "loops",
    "wider",
    "exits",
    "scaling",
)
ROOFLINE = "roofline"
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: 0, or 2 for a mistake in the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "directories", nargs="*", type=Path, metavar="DIRECTORY",
        help="benchmarks/results/<machine> (default: of all machines)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "performance.md", metavar="PAGE",
        help=f"the page to write, with {MODEL_PAGE} beside it (default: docs/performance.md)",
    )  # fmt: skip
    parser.add_argument("--readme", type=Path, help="file with markers for the short table")
    arguments = parser.parse_args(argv)
    try:
        require_matplotlib()
        directories = arguments.directories or sorted(p for p in RESULTS.glob("*") if p.is_dir())
        results = read_directories(directories)
        if not any(results.values()):
            where = ", ".join(map(str, directories)) or RESULTS
            raise ValueError(f"{where}: no result file; fusedacl bench writes them.")
        draw(results)
        beside = arguments.output.parent
        write_whole(arguments.output, page(results, beside))
        if any("scaling" in found for found in results.values()):
            write_whole(beside / MODEL_PAGE, modelled(results, beside))
        if arguments.readme is not None:
            table = headline({path.name: found for path, found in results.items()})
            if table:
                write_headline(arguments.readme, table)
    except ValueError as error:
        print(f"fusedacl.benchmarks.pages.performance: {error}", file=sys.stderr)
        return 2
    return 0


def read_directories(directories: Sequence[Path]) -> dict[Path, dict[str, Result]]:
    """Directory of a machine -> its results by file name, in the order of the page."""
    return {
        directory: {
            file.stem: read_result(file)
            for name in SUITES
            # Some cases of a suite may be in a file of their own.
            for file in (directory / f"{name}.json", *sorted(directory.glob(f"{name}_*.json")))
            if file.is_file()
        }
        for directory in directories
    }


def draw(results: dict[Path, dict[str, Result]]) -> None:
    """Draw every figure of the machines' results into their directories."""
    figures = {
        "growth": growth_figure.draw, "scaling": scaling_figure.draw, "step": step_figure.draw
    }  # fmt: skip
    for directory, found in results.items():
        directory.mkdir(parents=True, exist_ok=True)
        cases = _results_with_points(found)
        if cases:
            roofline.draw(cases, directory / ROOFLINE)
        for name, result in found.items():
            suite = name.partition("_")[0]
            if suite in figures:
                figures[suite](result, directory / name)


def _results_with_points(found: dict[str, Result]) -> list[Result]:
    results = [found[name] for name in ("loss", "angle") if name in found]
    return results if any(roofline.points(result) for result in results) else []


def page(results: dict[Path, dict[str, Result]], beside: Path) -> str:
    """The page of the machines' results; `beside`: its directory, to which links are relative."""
    parts = introduction({path.name: found for path, found in results.items()})
    for directory, found in results.items():
        parts += ["", f"## Machine `{directory.name}`"]
        steps = [name for name in found if name.partition("_")[0] == "step"]
        for name, result in found.items():
            figure = _link(directory / f"{name}.png", beside)
            if name == "growth":
                section = growth_section(result, figure)
            elif name in steps:
                shown = figure if step_figure.with_parts(result) else None
                section = step_section(result, shown, explain=name == steps[0])
            else:
                sections = {
                    "session": session_section, "steps": steps_section, "exits": exits_section,
                    "loops": loops_section, "wider": wider_section, "scaling": scaling_section,
                }  # fmt: skip
                section = sections.get(name, cases_section)(result)
            parts += ["", *section, "", _provenance(result["environment"])]
        if _results_with_points(found):
            file = _link(directory / f"{ROOFLINE}.png", beside)
            parts += ["", f"![Roofline of {directory.name}]({file})"]
    return "\n".join(parts) + "\n"


def modelled(results: dict[Path, dict[str, Result]], beside: Path) -> str:
    """The page of the scaling model, for the machines that have a scaling file."""
    return model_page(
        {
            directory.name: (found["scaling"], _link(directory / "scaling.png", beside))
            for directory, found in results.items()
            if "scaling" in found
        }
    )


def _link(file: Path, beside: Path) -> str:
    return Path(os.path.relpath(file, beside)).as_posix()


def _provenance(environment: Result) -> str:
    words = (
        "{cpu}, {cores} cores, {threads} thread{plural}; torch {torch}, Python {python}, "
        "pytorch-metric-learning {pytorch_metric_learning}; commit {commit}, {date}; load average "
        "before: {load_average[0]:.1f}."
    )
    return words.format(plural="" if environment["threads"] == 1 else "s", **environment)


if __name__ == "__main__":
    sys.exit(main())
