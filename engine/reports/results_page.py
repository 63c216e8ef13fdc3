"""docs/results.md: what runs and sweeps on real data say, from their result files alone."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..experiments.results import is_sweep, mean_and_deviation
from ..experiments.runs import OBJECTIVE_NAMES
from ..runtime.text import leader, markdown_table
from .page.page import Figure, Section, Table
from .sections.findings import compare
from .sweep_report import Report, report_sweep

REPORTS = "reports"
# Sections of a sweep's report that the page repeats.
_SHOWN = ("Layer scores", "Full models", "Ablation", "Values of", "Early exit")

# What the runs of one table may differ in.
_FREE_OPTIONS = ("objective", "gate", "seed")


def results_page(runs: Sequence[Path], reports: Mapping[str, Report]) -> str:
    """The page, from results.json files of runs and reports of sweeps: link to its folder -> it.

    Raises:
        ValueError: a file is not a run's results, or nothing was given.
    """
    found = sorted((_read_results(path) for path in runs), key=_run_order)
    if not found and not reports:
        raise ValueError("No results files: give the results.json of some runs, or a sweep.")
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
        parts += ["", f"## Several exits: {report.facts['Data']}", ""]
        parts += [f"- {name}: {value}" for name, value in report.facts.items() if name != "Data"]
        parts += [f"- Angles seen by the gate and the command of every run: [{link}]({link})"]
        for section in report.sections:
            if section.title.startswith(_SHOWN):
                parts += ["", f"### {section.title}", *_section(section, link)]
    if found:
        parts += [
            "",
            "## One exit: the objectives",
            "",
            "Within a data set the runs differ in objective, gate and seed only.",
        ]
    for data in dict.fromkeys(run["data"] for run in found):
        parts += ["", *_data_section(data, [run for run in found if run["data"] == data])]
    return "\n".join(parts) + "\n"


def _section(section: Section, link: str) -> list[str]:
    """A report's section: what it says, its tables, its figures in the report's folder, notes."""
    lines = ["", section.text] if section.text else []
    for table in section.tables:
        assert isinstance(table, Table)
        lines += ["", table.caption, "", markdown_table(table.header, table.rows)]
    for figure in section.figures:
        path = figure.path if isinstance(figure, Figure) else figure
        picture = path.with_suffix(".png").name
        lines += ["", f"![{section.title}]({link}{picture})"]
    return [*lines, "", *(f"- {note}" for note in section.notes)] if section.notes else lines


def _read_results(file: Path) -> dict[str, Any]:
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
        return {
            **run,
            "metrics": dict(run["metrics"]),
            "objective": str(run["objective"]),
            "seed": int(run["seed"]),
            "options": dict(run["options"]),
        }
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{str(file)!r} is not the results.json of a run: {error!r}") from None


def _run_order(run: dict[str, Any]) -> tuple[str, int, int]:
    return run["data"], list(OBJECTIVE_NAMES).index(run["objective"]), run["seed"]


def _check_comparable(data: str, runs: list[dict[str, Any]]) -> None:
    first = runs[0]["options"]
    for run in runs[1:]:
        for name, value in run["options"].items():
            if name not in _FREE_OPTIONS and value != first[name]:
                raise ValueError(
                    f"{data}: runs with {name}={first[name]!r} and {name}={value!r} cannot stand "
                    "in one table: they may differ in objective, gate and seed only."
                )


def _data_section(data: str, runs: list[dict[str, Any]]) -> list[str]:
    _check_comparable(data, runs)
    groups = {
        objective: [run for run in runs if run["objective"] == objective]
        for objective in dict.fromkeys(run["objective"] for run in runs)
    }
    lines = [f"### {data}"]
    for split in runs[0]["metrics"]:
        # The last exit is the model's answer.
        layer = list(runs[0]["metrics"][split])[-1]
        names = [name for name in runs[0]["metrics"][split][layer] if name != "loss"]
        scores = {
            (objective, name): [run["metrics"][split][layer][name] for run in group]
            for objective, group in groups.items()
            for name in names
        }
        leaders = {name: leader({o: scores[o, name] for o in groups}) for name in names}
        rows = []
        for objective, group in groups.items():
            cells = [OBJECTIVE_NAMES[objective], str(len(group))]
            for name in names:
                words = mean_and_deviation(scores[objective, name])
                cells.append(f"**{words}**" if leaders[name] == objective else words)
            loss = [run["metrics"][split][layer]["loss"] for run in group]
            rows.append([*cells, f"{statistics.mean(loss):.3f}", _dropped(group)])
        header = ["objective", "seeds", *names, "loss", "steps dropped"]
        lines += ["", f"Split `{split}`:", "", markdown_table(header, rows), ""]
        for name in names:
            lines.append(f"- {name}: {_verdicts({o: scores[o, name] for o in groups})}")
    gated = [run for run in runs if run["gate"]]
    if gated:
        lines += ["", "The gate, by epoch (all seeds together):", "", _gate_table(gated)]
    lines += ["", "Commands:", "", "```", *(run["command"] for run in runs), "```"]
    return lines


def _verdicts(scores: dict[str, list[float]]) -> str:
    """ACL against each other objective, in words."""
    others = [objective for objective in scores if objective != "acl"]
    if "acl" not in scores or not others:
        return "nothing to compare."
    return " ".join(_verdict(other, scores["acl"], scores[other]) for other in others)


def _verdict(objective: str, acl: list[float], other: list[float]) -> str:
    found = compare(acl, other)
    words = f"ACL - {OBJECTIVE_NAMES[objective]} = {found.words}"
    if found.noise is None:
        return f"{words}."
    outcome = "wins" if found.difference > 0 else "loses"
    return f"{words}: ACL {outcome if found.is_clear else 'does not win'}."


def _dropped(group: list[dict[str, Any]]) -> str:
    rows = [row for run in group for row in run["gate"]]
    if not rows:
        return "-"
    share = sum(row["dropped_share"] * row["steps"] for row in rows)
    return f"{share / sum(row['steps'] for row in rows):.1%}"


def _gate_table(runs: list[dict[str, Any]]) -> str:
    rows = []
    every = [{"group": "model", **row} for run in runs for row in run["gate"]]
    places = dict.fromkeys((row["epoch"], row["group"]) for row in every)
    many = len({group for _, group in places}) > 1
    for epoch, group in sorted(places):
        here = [row for row in every if (row["epoch"], row["group"]) == (epoch, group)]
        steps = sum(row["steps"] for row in here)
        dropped = sum(row["dropped_share"] * row["steps"] for row in here) / steps
        medians = [row["angle_median"] for row in here]
        spread = (min(row["angle_p10"] for row in here), max(row["angle_p90"] for row in here))
        rows.append(
            [
                f"{epoch}, {group}" if many else str(epoch),
                str(steps),
                f"{dropped:.1%}",
                f"{statistics.mean(medians):.0f}",
                f"{spread[0]:.0f} to {spread[1]:.0f}",
            ]
        )
    header = ["epoch", "steps", "dropped", "median angle (degrees)", "10th to 90th percentile"]
    return markdown_table(header, rows)


def main() -> None:
    """`python -m fusedacl.engine.reports.results_page docs/results --output docs/results.md`."""
    parser = argparse.ArgumentParser(
        description="Write the results page, and beside it the report of every sweep."
    )
    parser.add_argument("directory", type=Path, help="results.json files and directories of sweeps")
    parser.add_argument("--output", type=Path, required=True, help="the page to write")
    arguments = parser.parse_args()
    output: Path = arguments.output
    entries = sorted(arguments.directory.iterdir())
    reports = {
        f"{REPORTS}/{sweep.name}/": report_sweep(sweep, output.parent / REPORTS / sweep.name)
        for sweep in entries
        if is_sweep(sweep)
    }
    runs = [path for path in entries if path.suffix == ".json"]
    output.write_text(results_page(runs, reports), encoding="utf-8")


if __name__ == "__main__":
    main()
