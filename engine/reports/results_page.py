"""docs/results.md: findings of the sweeps on real data, made from their result files alone."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..experiments.results import is_sweep
from ..runtime.text import markdown_table
from .page.page import Section
from .sections.early_exit import GUARANTEE, ONNX_SPEED_UP, SPEED_UP
from .sweep_report import Report, report_sweep

REPORTS = "reports"
# Sections of a sweep's report that the page repeats.
_SHOWN = ("Layer scores", "Full models", "Ablation", "Values of", "Early exit")

# Methods of claims, and the providers of `fusedacl bench step` that have their training step.
_TIMED = {"ACL": "fusedacl_acl", "CE+SCL": "fusedacl_scl"}
_TERMS = (
    "- CE: cross-entropy alone. CE+SCL: with the supervised contrastive loss. ACL: with label "
    "embeddings in the contrastive batch, and with the gate, which drops the contrastive gradient "
    "in steps in which its angle to the gradient of CE exceeds 90 degrees.",
    "- JT, ALT, 2ST: several exits trained jointly, alternately, or in two stages (backbone and "
    "last exit first, then the other exits on the frozen backbone). KD: distilled from the last "
    "exit. ACL with several exits: ACL-CL, in which each exit is contrasted with the last one.",
    "- MHA and linear: kinds of exit. Layer: where an exit reads, counted from 1.",
)


def results_page(
    reports: Mapping[str, Report], folder: Path, costs: Mapping[str, float] | None = None
) -> str:
    """The page in `folder`, from reports of sweeps: link to a report's folder -> the report.

    costs: method -> time of its training step, divided by that of CE.

    Raises:
        ValueError: there is no report.
    """
    if not reports:
        raise ValueError("No sweeps: name a directory that holds the directories of sweeps.")
    parts = [
        "# Results on real data",
        "",
        *_in_short(reports, costs or {}),
        "## Terms",
        "",
        "Made by `make docs` from the files in `docs/results/`; no number is typed by hand. Scores "
        "are those after the last step, in percent, mean ± standard deviation (n - 1) over the "
        "seeds; a single seed has no deviation. Methods are compared seed by seed: a best mean is "
        "bold, and a claim holds, where the 95 % t interval of the differences is above 0. The "
        "time of a step is that of a model with one exit in float32 on two CPU cores "
        "(`fusedacl bench step`).",
        "",
        *_TERMS,
    ]
    claims = _claims(reports)
    parts += ["", "## Claims of the paper"] if claims else []
    for name, section in claims:
        parts += ["", f"### {name}"] if len(claims) > 1 else []
        parts += _section(section, folder)
    for link, report in reports.items():
        exits = "Several exits" if report.max_exits > 1 else "One exit"
        parts += ["", f"## {exits}: {report.facts['Data']}", ""]
        parts += [f"- {name}: {value}" for name, value in report.facts.items() if name != "Data"]
        parts += [f"- Angles seen by the gate and the command of every run: [{link}]({link})"]
        for section in report.sections:
            if section.title.startswith(_SHOWN):
                parts += ["", f"### {section.title}", *_section(section, folder)]
    return "\n".join(parts) + "\n"


def _claims(reports: Mapping[str, Report]) -> list[tuple[str, Section]]:
    """Names of the sweeps that check claims, and the section of each."""
    return [
        (Path(link).name, section)
        for link, report in reports.items()
        for section in report.sections
        if section.title == "Claims"
    ]


def _in_short(reports: Mapping[str, Report], costs: Mapping[str, float]) -> list[str]:
    """Lines on what was found: differences that several seeds show, and times of early exit."""
    sections = [section for report in reports.values() for section in report.sections]
    few = {Path(link).name: report.few_texts for link, report in reports.items()}
    differences = _differences(_claims(reports), few, costs)
    times = _early_exits([section for section in sections if "Early exit: " in section.title])
    if not differences and not times:
        return []
    terms = (
        "Differences of the scores in points, with their 95 % intervals; trec6-10: 10 training "
        "texts of each class. A difference that supports the claim is positive. “Use it”: at least "
        "half of the results that follow are clearly above 0, and none is clearly below; “do not "
        "use it”: some are clearly below, and none is clearly above."
    )
    return [
        *([terms, ""] if differences else []),
        *differences,
        *times,
        "- Times and memory of a step are in [performance.md](performance.md); whether the "
        "contrastive term pays on your own data, `fusedacl try` measures "
        "([experiments.md](experiments.md)).",
        "",
    ]


def _differences(
    claims: Sequence[tuple[str, Section]],
    few: Mapping[str, Collection[str]],
    costs: Mapping[str, float],
) -> list[str]:
    """A line for each claim that several seeds check, first those on CE, with advice.

    A task of several sweeps is followed by the name of the sweep. few: sweep -> its tasks with few
    training texts of each class.
    """
    sweeps: dict[str, set[str]] = {}
    for sweep, section in claims:
        for task in (row[0] for table in section.tables for row in table.rows):
            sweeps.setdefault(task, set()).add(sweep)
    found: dict[tuple[str, str], _Found] = {}
    for sweep, section in claims:
        for table in section.tables:
            claim, _, measure = table.caption.partition("”: ")
            of_claim = found.setdefault((claim.lstrip("“"), measure.rstrip(".")), _Found())
            of_claim.over_ce |= table.header[2] == "CE"
            for task, _, _, difference, interval, verdict in table.rows:
                where = task if len(sweeps[task]) == 1 else f"{task} ({sweep})"
                group = of_claim.few if task in few[sweep] else of_claim.all
                if verdict == "not clear":
                    group.unclear.append(where)
                elif interval:
                    words = f"{difference} points on {where} ({interval})"
                    (group.better if verdict == "holds" else group.worse).append(words)
    lines = []
    for (claim, measure), of_claim in sorted(found.items(), key=lambda item: not item[1].over_ce):
        if not (of_claim.few or of_claim.all):
            continue
        words = f"**“{claim}”**"
        _, spreads, option = measure.partition("over the values of ")
        if spreads:
            words += f" (how much less the score depends on {option})"
        elif measure != "the mean score over the exits":
            words += f" ({measure})"
        cost = _cost(claim, costs) if of_claim.over_ce else ""
        lines.append(f"- {words}. {of_claim.words}{cost}")
    return lines


@dataclass
class _Differences:
    """Differences on some tasks: those clearly above 0, clearly below, and the tasks of others."""

    better: list[str] = field(default_factory=list)
    worse: list[str] = field(default_factory=list)
    unclear: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.better or self.worse or self.unclear)

    @property
    def words(self) -> str:
        clear = ", ".join([*self.better, *self.worse])
        unclear = f"no clear difference on {', '.join(self.unclear)}" if self.unclear else ""
        return "; ".join(part for part in (clear, unclear) if part)

    @property
    def advice(self) -> str:
        """Words for the user of a loss: it is worth its price where half the sets gain clearly."""
        total = len(self.better) + len(self.worse) + len(self.unclear)
        if self.better and self.worse:
            return "try it on your data"
        if self.worse:
            return "do not use it"
        if 2 * len(self.better) >= total:
            return "use it"
        return "a gain is possible" if self.better else "nothing speaks for it"


@dataclass
class _Found:
    """Results on a claim with few training texts of each class, and with all texts."""

    few: _Differences = field(default_factory=_Differences)
    all: _Differences = field(default_factory=_Differences)
    over_ce: bool = False

    @property
    def words(self) -> str:
        """A sentence for each kind of task, with advice where CE is the alternative."""
        if not self.few and not self.over_ce:
            return f"{self.all.words[0].upper()}{self.all.words[1:]}."
        sentences = []
        for group, texts in ((self.few, "few texts of each class"), (self.all, "all texts")):
            if group:
                advice = f", {group.advice}" if self.over_ce else ""
                sentences.append(f"With {texts}{advice}: {group.words}.")
        return " ".join(sentences)


def _cost(claim: str, costs: Mapping[str, float]) -> str:
    """A sentence on the time of a step, for a claim that opens with a method that was timed."""
    method = claim.partition(" ")[0]
    if method not in costs:
        return ""
    return f" A step takes {costs[method]:.2f} times as long as one of CE."


def _early_exits(sections: Sequence[Section]) -> list[str]:
    """A line for each guarantee of early exit (largest share lost, and confidence)."""
    found: dict[str, list[str]] = {}
    for section in sections:
        task = section.title.removeprefix("Early exit: ")
        for table in section.tables:
            for row in table.rows:
                cells = dict(zip(table.header, row, strict=True))
                times = ", ".join(
                    f"{' and '.join(speeds)}{where}"
                    for start, where in ((SPEED_UP, ""), (ONNX_SPEED_UP, " on onnxruntime"))
                    if (speeds := _speeds(cells, start))
                )
                if times and (promise := cells.get(GUARANTEE)):
                    found.setdefault(promise, []).append(f"{task} ({cells['method']}) {times}")
    return [
        f"- **Early exit, guarantee {promise}** (largest share of answers lost, and confidence), "
        "times faster than the full model in PyTorch: "
        f"{'; '.join(tasks)} ([exits.md](exits.md))."
        for promise, tasks in found.items()
    ]


def _speeds(cells: Mapping[str, str], start: str) -> list[str]:
    """The columns whose name starts so, in words: `2.38x at batch 1`."""
    return [
        f"{value} at batch {name.removeprefix(start)}"
        for name, value in cells.items()
        if name.startswith(start) and value
    ]


def _section(section: Section, folder: Path) -> list[str]:
    """Text, tables, figures and notes of a section, as Markdown of a page in `folder`."""
    lines = ["", section.text] if section.text else []
    for table in section.tables:
        lines += ["", table.caption, "", markdown_table(table.header, table.rows)]
    for figure in section.figures:
        picture = Path(os.path.relpath(figure.path.with_suffix(".png"), folder)).as_posix()
        lines += ["", f"![{section.title}]({picture})"]
    return [*lines, "", *(f"- {note}" for note in section.notes)] if section.notes else lines


def step_costs(path: Path) -> dict[str, float]:
    """Method -> time of its step, divided by that of CE: medians of the file's first case."""
    providers = json.loads(path.read_text(encoding="utf-8"))["cases"][0]["providers"]
    base = providers["fusedacl_ce"]["p50_ms"]
    return {method: providers[name]["p50_ms"] / base for method, name in _TIMED.items()}


def main() -> None:
    """`python -m fusedacl.engine.reports.results_page docs/results --output docs/results.md`."""
    parser = argparse.ArgumentParser(
        description="Write the results page, and beside it the report of every sweep."
    )
    parser.add_argument("directory", type=Path, help="directory that holds those of sweeps")
    parser.add_argument("--output", type=Path, required=True, help="the page to write")
    parser.add_argument("--step", type=Path, help="result file of `fusedacl bench step`")
    arguments = parser.parse_args()
    output: Path = arguments.output
    reports = {
        f"{REPORTS}/{sweep.name}/": report_sweep(sweep, output.parent / REPORTS / sweep.name)
        for sweep in sorted(arguments.directory.iterdir())
        if is_sweep(sweep)
    }
    costs = {} if arguments.step is None else step_costs(arguments.step)
    output.write_text(results_page(reports, output.parent, costs), encoding="utf-8")


if __name__ == "__main__":
    main()
