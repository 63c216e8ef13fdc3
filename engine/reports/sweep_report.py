"""`fusedacl report`: the figures, tables and the page of a sweep, or of runs given by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..experiments.recipe import slug
from ..experiments.report_plan import ReportPlan, plan_report
from ..experiments.results import SweepResults, SweepRun, is_sweep, read_sweep
from ..experiments.runs import read_results, run_label
from ..runtime.plots import require_matplotlib
from .page.page import Section, Table, captioned_figures, write_page
from .sections.claims import claims_section
from .sections.early_exit import exits_section
from .sections.findings import layer_findings, overall_finding
from .sections.gate_angles import gate_section
from .sections.layer_scores import LayerScores, read_curves, sweep_curves, write_layer_scores
from .sections.score_tables import ablation_section, full_model_section, grid_section

PAGE_FILE = "index.html"
REPORT_DIR = "report"
EXTRAS_DIR = "extras"
# Histograms side by side; beyond, methods with a list of values are left to their own reports.
_MOST_PANELS = 6


@dataclasses.dataclass(frozen=True)
class Report:
    """What was written: the page, and its parts for those who want to print them.

    facts: what was run, name -> value.
    """

    page: Path
    findings: Sequence[str]
    sections: Sequence[Section]
    facts: Mapping[str, str]


def write_report(
    paths: Sequence[Path], output_dir: Path | None = None, metric: str | None = None
) -> Report:
    """The report of one sweep (by default in its folder `report`), or of runs.

    Raises:
        ValueError: a path that is neither, a sweep among other paths, runs that do not belong
            together or without `output_dir`, an unknown metric, or matplotlib is not installed.
    """
    require_matplotlib()
    sweeps = [path for path in paths if is_sweep(path)]
    if not sweeps:
        if output_dir is None:
            raise ValueError(
                "output_dir is missing: name a directory for the report of these runs."
            )
        return report_runs(paths, output_dir, metric)
    if len(paths) > 1:
        raise ValueError(
            f"{str(sweeps[0])!r} is a sweep, whose report stands alone: name one sweep, or runs."
        )
    return report_sweep(paths[0], output_dir, metric)


def report_sweep(
    directory: Path, output_dir: Path | None = None, metric: str | None = None
) -> Report:
    """The analyses that the sweep's recipe asks for, from the runs that are done.

    Raises:
        ValueError: no sweep, a mistake in its `report` section, no run that is done, or a metric
            that a task's runs do not report.
    """
    sweep = read_sweep(directory)
    plan = plan_report(sweep.recipe)
    if not sweep.done:
        raise ValueError(f"{str(directory)!r}: no run is done yet, so there is nothing to report.")
    output_dir = directory / REPORT_DIR if output_dir is None else output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    reference = _reference(plan)
    sections: list[Section | None] = []
    curves: dict[str, LayerScores] = {}
    for task in sweep.tasks:
        scores = sweep_curves(sweep, task, plan.layer_scores, metric)
        if scores is None:
            continue
        curves[task] = scores
        path = output_dir / f"layer_scores_{slug(task)}"
        section = write_layer_scores(scores, path, f"Layer scores: {task}")
        text = "" if reference is None else layer_findings(scores, reference)
        sections.append(dataclasses.replace(section, text=text))
    tables = []
    if plan.full_model:
        path = output_dir / "full_model"
        tables.append(full_model_section(sweep, plan.full_model, metric, path))
    if plan.ablation:
        tables.append(ablation_section(sweep, plan.ablation, metric, output_dir / "ablation"))
    tables += [
        grid_section(sweep, grid, metric, output_dir / f"values_{slug(grid.option)}_{number}")
        for number, grid in enumerate(plan.grids, start=1)
    ]
    # First, being what a reader came for.
    claims = claims_section(sweep, plan.claims, metric, output_dir / "claims")
    sections = [claims, *sections, *tables]
    for task in sweep.tasks:
        place = output_dir / f"gate_angles_{slug(task)}"
        sections.append(_gate_angles(sweep, task, place))
    for task in sweep.tasks:
        place = output_dir / f"early_exit_{slug(task)}"
        runs = _by_label([run for run in sweep.runs if run.task == task])
        sections.append(exits_section(runs, task, place, f"Early exit: {task}"))
    sections += [_extras(output_dir, [directory]), _missing(sweep)]
    sections.append(_commands(sweep))
    findings = [_progress(sweep), "" if claims is None else claims.text]
    if reference is not None:
        findings.append(overall_finding(curves, reference))
    findings += [section.text for section in tables if section is not None]
    there = [section for section in sections if section is not None]
    title = f"Sweep report: {', '.join(sweep.tasks)}"
    findings = [finding for finding in findings if finding]
    facts = _facts(sweep)
    page = write_page(output_dir / PAGE_FILE, title, findings, there, facts)
    return Report(page, findings, there, facts)


def report_runs(paths: Sequence[Path], output_dir: Path, metric: str | None = None) -> Report:
    """Scores of every exit of some runs on one data set; seeds of one method are one line.

    Raises:
        ValueError: as `layer_scores.read_curves`.
    """
    scores = read_curves(paths, metric)
    output_dir.mkdir(parents=True, exist_ok=True)
    runs = [_run_by_hand(path) for path in paths]
    section = write_layer_scores(scores, output_dir / "layer_scores", "Layer scores")
    grouped, data = _by_label(runs), runs[0].task
    sections = [
        section,
        gate_section(grouped, data, output_dir / "gate_angles", "Gate angles"),
        exits_section(grouped, data, output_dir / "early_exit", "Early exit"),
        _extras(output_dir, paths),
        Section("Commands", commands=[_command(run) for run in runs if _command(run)]),
    ]
    there = [section for section in sections if section is not None]
    methods = ", ".join(curve.label for curve in scores.curves)
    findings = [f"Scores of every exit on {scores.data}: {methods}."]
    together = SweepResults(Path("."), {}, tuple(runs), {})
    facts = _facts(together)
    page = write_page(output_dir / PAGE_FILE, f"Runs on {data}", findings, there, facts)
    return Report(page, findings, there, facts)


def _run_by_hand(path: Path) -> SweepRun:
    results = read_results(path)
    options = results["options"]
    return SweepRun(
        task=str(results["data"]),
        method=run_label(options),
        seed=int(options.get("seed", 0)),
        grid=(),
        directory=path if path.is_dir() else path.parent,
        problem=None,
        results=results,
    )


def _reference(plan: ReportPlan) -> str | None:
    """The printed name of the method that others are compared with.

    That is the first of the ablation, where the curves show it, else the last of the curves.
    """
    names = list(plan.layer_scores)
    for target in list(plan.ablation.values())[:1]:
        for name in names:
            if plan.layer_scores[name].method == target.method:
                return name
    return names[-1] if names else None


def _by_label(runs: Sequence[SweepRun]) -> dict[str, list[SweepRun]]:
    found: dict[str, list[SweepRun]] = {}
    for run in runs:
        found.setdefault(run.label, []).append(run)
    return found


def _gate_angles(sweep: SweepResults, task: str, path: Path) -> Section | None:
    """The gated runs of a task; without those of grids where they are too many to look at."""
    gated = [
        run
        for run in sweep.done
        if run.task == task and run.results is not None and run.results.get("gate")
    ]
    plain = [run for run in gated if not run.grid]
    too_many = len(_by_label(gated)) > _MOST_PANELS and len(plain) < len(gated)
    shown = _by_label(plain if too_many else gated)
    section = gate_section(shown, task, path, f"Gate angles: {task}")
    if section is None or not too_many:
        return section
    left_out = ", ".join(dict.fromkeys(run.method for run in gated if run.grid))
    note = f"Left out, having a list of values each: {left_out}."
    return dataclasses.replace(section, notes=[*section.notes, note])


def _extras(output_dir: Path, given: Sequence[Path]) -> Section | None:
    """Pictures with captions that other commands left in the report, its extras, or the runs."""
    extras = output_dir / EXTRAS_DIR
    folders = sorted(path for path in extras.glob("*") if path.is_dir())
    figures = captioned_figures([output_dir, extras, *folders, *given])
    return Section("More figures", figures=figures) if figures else None


def _missing(sweep: SweepResults) -> Section | None:
    seeds: dict[tuple[str, str, str], list[str]] = {}
    for run in sweep.runs:
        if run.results is None:
            seeds.setdefault((run.task, run.label, str(run.problem)), []).append(str(run.seed))
    if not seeds:
        return None
    rows = [
        [task, label, ", ".join(of_reason), reason]
        for (task, label, reason), of_reason in seeds.items()
    ]
    words = (
        f"{len(sweep.runs) - len(sweep.done)} of {len(sweep.runs)} runs have no results. Nothing "
        "above stands in for them; `fusedacl sweep` with the same recipe and directory goes on "
        "with them."
    )
    return Section("Missing runs", words, tables=[Table(["task", "method", "seeds", "why"], rows)])


def _commands(sweep: SweepResults) -> Section:
    name = sweep.directory.resolve().name
    words = (
        f"All of it: `fusedacl sweep {name}/recipe.yaml --output_dir {name}`, then `fusedacl "
        f"report {name}`. Below, each run alone; paths are relative to {name}/."
    )
    place = f"{sweep.directory.resolve()}/"
    commands = [command.replace(place, "") for run in sweep.done if (command := _command(run))]
    return Section("Commands", words, commands=commands)


def _command(run: SweepRun) -> str:
    return str((run.results or {}).get("command", ""))


def _progress(sweep: SweepResults) -> str:
    done, every = len(sweep.done), len(sweep.runs)
    if done == every:
        return ""
    return (
        f"**Unfinished**: {done} of {every} runs are done; tables and figures name what is missing."
    )


def _facts(sweep: SweepResults) -> dict[str, str]:
    """What was run, on what, with what."""
    seeds = sorted({run.seed for run in sweep.runs})
    options = [run.results["options"] for run in sweep.done if run.results]
    seconds = sum(float((run.results or {}).get("train_seconds", 0)) for run in sweep.done)
    data = [f"{task} ({words})" if (words := _texts(sweep, task)) else task for task in sweep.tasks]
    models = dict.fromkeys(
        _model_name(values) for values in options if not values.get("stage1_model")
    )
    versions: dict[str, dict[str, None]] = {}
    for run in sweep.done:
        for package, number in (run.results or {}).get("versions", {}).items():
            versions.setdefault(package, {})[str(number)] = None
    facts = {
        "Data": "; ".join(data),
        "Base model": ", ".join(models) or "named by first stages that are not among these runs",
        "Runs": f"{len(sweep.done)} of {len(sweep.runs)} done; seeds {', '.join(map(str, seeds))}",
    }
    if seconds:
        facts["Training time"] = _duration(seconds) + " in all"
    if versions:
        facts["Versions"] = ", ".join(
            f"{package} {' and '.join(numbers)}" for package, numbers in versions.items()
        )
    recorded: Mapping[str, Any] = sweep.environment
    facts |= {str(name).capitalize(): str(value) for name, value in recorded.items()}
    return facts


def _texts(sweep: SweepResults, task: str) -> str:
    """What of a task's texts was used: "validation; 10,000 training texts"."""
    words = [", ".join(sweep.splits(task))]
    for option, of_what in (("max_train_samples", "training"), ("max_eval_samples", "evaluation")):
        limits = {
            run.results["options"].get(option)
            for run in sweep.done
            if run.task == task and run.results is not None
        }
        words += [f"{limit:,} {of_what} texts" for limit in sorted(limits - {None})]
    return "; ".join(word for word in words if word)


def _model_name(options: Mapping[str, Any]) -> str:
    """A hub name as it is; of a path its end, which says enough."""
    name = options.get("model_name_or_path")
    if name is None:
        return "all-MiniLM-L6-v2 (the demonstration's)"
    parts = str(name).rstrip("/").split("/")
    return "/".join(parts[-2:])


def _duration(seconds: float) -> str:
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
