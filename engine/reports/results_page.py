"""docs/results.md: findings of the sweeps on real data, made from their result files alone."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from ..experiments.results import is_sweep
from ..runtime.text import markdown_table
from .page.page import Section
from .sweep_report import Report, report_sweep

REPORTS = "reports"
# Sections of a sweep's report that the page repeats.
_SHOWN = ("Layer scores", "Full models", "Ablation", "Values of", "Early exit")


def results_page(reports: Mapping[str, Report]) -> str:
    """The page, from reports of sweeps: link to a report's folder -> the report.

    Raises:
        ValueError: there is no report.
    """
    if not reports:
        raise ValueError("No sweeps: name a directory that holds the directories of sweeps.")
    parts = [
        "# Results on real data",
        "",
        "Made by `make docs` from the files in `docs/results/`; no number is typed by hand. Scores "
        "are those after the last step, in percent, mean ± standard deviation (n - 1) over the "
        "seeds; a single seed has no deviation. A best mean is bold, and a claim holds, where the "
        "lead exceeds the sum of both deviations.",
    ]
    claims = [
        section
        for report in reports.values()
        for section in report.sections
        if section.title == "Claims"
    ]
    if claims:
        parts += ["", "## Claims of the paper"]
        for section in claims:
            parts += _section(section, "")
    for link, report in reports.items():
        exits = "Several exits" if report.max_exits > 1 else "One exit"
        parts += ["", f"## {exits}: {report.facts['Data']}", ""]
        parts += [f"- {name}: {value}" for name, value in report.facts.items() if name != "Data"]
        parts += [f"- Angles seen by the gate and the command of every run: [{link}]({link})"]
        for section in report.sections:
            if section.title.startswith(_SHOWN):
                parts += ["", f"### {section.title}", *_section(section, link)]
    return "\n".join(parts) + "\n"


def _section(section: Section, link: str) -> list[str]:
    """Text, tables, figures (in the report's folder) and notes of a section, as Markdown."""
    lines = ["", section.text] if section.text else []
    for table in section.tables:
        lines += ["", table.caption, "", markdown_table(table.header, table.rows)]
    for figure in section.figures:
        picture = figure.path.with_suffix(".png").name
        lines += ["", f"![{section.title}]({link}{picture})"]
    return [*lines, "", *(f"- {note}" for note in section.notes)] if section.notes else lines


def main() -> None:
    """`python -m fusedacl.engine.reports.results_page docs/results --output docs/results.md`."""
    parser = argparse.ArgumentParser(
        description="Write the results page, and beside it the report of every sweep."
    )
    parser.add_argument("directory", type=Path, help="directory that holds those of sweeps")
    parser.add_argument("--output", type=Path, required=True, help="the page to write")
    arguments = parser.parse_args()
    output: Path = arguments.output
    reports = {
        f"{REPORTS}/{sweep.name}/": report_sweep(sweep, output.parent / REPORTS / sweep.name)
        for sweep in sorted(arguments.directory.iterdir())
        if is_sweep(sweep)
    }
    output.write_text(results_page(reports), encoding="utf-8")


if __name__ == "__main__":
    main()
