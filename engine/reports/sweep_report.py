"""`fusedacl report`: figures, tables and a page for a sweep, or for single runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..experiments.recipe import slug
from ..experiments.report_plan import ReportPlan, Target, plan_report
from ..experiments.results import SweepResults, SweepRun, collect_runs, is_sweep, read_sweep
from ..runtime.plots import require_matplotlib
from .page.page import Section, Table, captioned_figures, write_page
from .sections.claims import claims_section
from .sections.early_exit import exits_section
from .sections.findings import layer_findings, overall_finding
from .sections.gate_angles import gate_section
from .sections.layer_scores import LayerScores, sweep_curves, write_layer_scores
from .sections.score_tables import ablation_section, full_model_section, grid_section

# With more histograms than this, methods with a list of values are left out.
_MAX_PANELS = 6


@dataclasses.dataclass(frozen=True)
class Report:
    """A report that was written: its page, and the contents of the page.

    facts: data, model, versions, …: name -> value. max_exits: the most exits of a run.
    few_texts: the tasks whose training texts are limited by class.
    """

    page: Path
    findings: Sequence[str]
    sections: Sequence[Section]
    facts: Mapping[str, str]
    max_exits: int
    few_texts: Collection[str] = ()


def write_report(
    paths: Sequence[Path], output_dir: Path | None = None, metric: str | None = None
) -> Report:
    """The report of a sweep (by default in its folder `report`), or of runs.

    Raises:
        ValueError: a path is neither, a sweep is among other paths, runs do not belong together,
            `output_dir` is missing for runs, the metric is unknown, or matplotlib is missing.
    """
    require_matplotlib()
    sweep = next((path for path in paths if is_sweep(path)), None)
    if sweep is not None:
        if len(paths) > 1:
            raise ValueError(
                f"{str(sweep)!r} is a sweep, whose report stands alone: name one sweep, or runs."
            )
        return report_sweep(sweep, output_dir, metric)
    if output_dir is None:
        raise ValueError("output_dir is missing: name a directory for the report of these runs.")
    return report_runs(paths, output_dir, metric)


def report_sweep(
    directory: Path,
    output_dir: Path | None = None,
    metric: str | None = None,
    answer: Sequence[str] = (),
) -> Report:
    """The analyses that the recipe of a sweep asks for, of the runs that are done.

    answer: sentences that come before the findings.

    Raises:
        ValueError: no sweep, a mistake in its `report` section, no run is done, or the runs of a
            task do not report `metric`.
    """
    sweep = read_sweep(directory)
    plan = plan_report(sweep.recipe)
    if not sweep.done:
        raise ValueError(f"{str(directory)!r}: no run is done yet, so there is nothing to report.")
    output_dir = directory / "report" if output_dir is None else output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    reference = _reference(plan)
    curves: dict[str, LayerScores] = {}
    for task in sweep.tasks:
        scores = sweep_curves(sweep, task, plan.layer_scores, metric)
        if scores is not None:
            curves[task] = scores
    tables = []
    if plan.full_model:
        path = output_dir / "full_model"
        tables.append(full_model_section(sweep, plan.full_model, metric, path, plan.all_metrics))
    if plan.ablation:
        tables.append(ablation_section(sweep, plan.ablation, metric, output_dir / "ablation"))
    tables += [
        grid_section(sweep, grid, metric, output_dir / f"values_{slug(grid.option)}_{number}")
        for number, grid in enumerate(plan.grids, start=1)
    ]
    claims = claims_section(sweep, plan.claims, metric, output_dir / "claims")
    sections = [claims]
    for task, scores in curves.items():
        path, title = output_dir / f"layer_scores_{slug(task)}", f"Layer scores: {task}"
        text = layer_findings(scores, reference)
        sections.append(write_layer_scores(scores, path, title, text))
    sections += tables
    for task in sweep.tasks:
        sections.append(_gate_angles(sweep, task, output_dir / f"gate_angles_{slug(task)}"))
    for task in sweep.tasks:
        path = output_dir / f"early_exit_{slug(task)}"
        runs = _by_label([run for run in sweep.runs if run.task == task])
        sections.append(exits_section(runs, task, path, f"Early exit: {task}"))
    sections += [_extras(output_dir, [directory]), _missing(sweep), _commands(sweep)]
    done, every = len(sweep.done), len(sweep.runs)
    findings = [
        *answer,
        f"**Unfinished**: {done} of {every} runs are done; tables and figures name what is missing."
        if done < every
        else "",
        "" if claims is None else claims.text,
        overall_finding(curves, reference),
        *(section.text for section in tables if section is not None),
    ]
    title = f"Sweep report: {', '.join(sweep.tasks)}"
    return _write(sweep, output_dir, title, findings, sections)


def report_runs(paths: Sequence[Path], output_dir: Path, metric: str | None = None) -> Report:
    """Scores of every exit of some runs on one data set; the seeds of a method share a line.

    Raises:
        ValueError: as `collect_runs`, or no run has a finite score.
    """
    runs = collect_runs(paths)
    (data,) = runs.tasks
    scores = sweep_curves(runs, data, {name: Target(name) for name in runs.methods}, metric)
    if scores is None:
        name = str(runs.metric(data, metric))
        by_method = [runs.seeds(data, m, (), lambda run: run.average(name)) for m in runs.methods]
        reasons = dict.fromkeys(why for seeds in by_method for why in seeds.problems.values())
        raise ValueError(f"no run has finite scores: {'; '.join(reasons)}.")
    output_dir.mkdir(parents=True, exist_ok=True)
    grouped = _by_label(runs.runs)
    sections = [
        write_layer_scores(scores, output_dir / "layer_scores", "Layer scores"),
        gate_section(grouped, data, output_dir / "gate_angles", "Gate angles"),
        exits_section(grouped, data, output_dir / "early_exit", "Early exit"),
        _extras(output_dir, paths),
        Section("Commands", commands=_commands_of(runs.runs)),
    ]
    methods = ", ".join(curve.label for curve in scores.curves)
    findings = [f"Scores of every exit on {scores.data}: {methods}."]
    return _write(runs, output_dir, f"Runs on {data}", findings, sections)


def _write(
    sweep: SweepResults,
    output_dir: Path,
    title: str,
    findings: Sequence[str],
    sections: Sequence[Section | None],
) -> Report:
    there = [section for section in sections if section is not None]
    findings = [finding for finding in findings if finding]
    facts = _facts(sweep)
    page = write_page(output_dir / "index.html", title, findings, there, facts)
    max_exits = max((len(run.layers()) for run in sweep.done if run.evaluated), default=0)
    few_texts = {run.task for run in sweep.done if run.options.get("max_train_samples_per_class")}
    return Report(page, findings, there, facts, max_exits, few_texts)


def _reference(plan: ReportPlan) -> str | None:
    """The printed name of the method that others are compared with.

    It is the first method of the ablation if it has a curve, else the last of the curves.
    """
    names = list(plan.layer_scores)
    compared = [target.method for target in plan.ablation.values()][:1]
    same = [name for name in names if plan.layer_scores[name].method in compared]
    return next(iter(same + names[-1:]), None)


def _by_label(runs: Sequence[SweepRun]) -> dict[str, list[SweepRun]]:
    found: dict[str, list[SweepRun]] = {}
    for run in runs:
        found.setdefault(run.label, []).append(run)
    return found


def _gate_angles(sweep: SweepResults, task: str, path: Path) -> Section | None:
    """The gated runs of a task, without those of grids if there are too many."""
    gated = [run for run in sweep.done if run.task == task and run.gate]
    of_grids = dict.fromkeys(run.method for run in gated if run.grid)
    too_many = len(_by_label(gated)) > _MAX_PANELS and of_grids
    shown = _by_label([run for run in gated if not (too_many and run.grid)])
    section = gate_section(shown, task, path, f"Gate angles: {task}")
    if section is None or not too_many:
        return section
    note = f"Left out, having a list of values each: {', '.join(of_grids)}."
    return dataclasses.replace(section, notes=[*section.notes, note])


def _extras(output_dir: Path, given: Sequence[Path]) -> Section | None:
    """Captioned figures of other commands, in the report's directory, its extras, or the runs."""
    extras = output_dir / "extras"
    folders = sorted(path for path in extras.glob("*") if path.is_dir())
    figures = captioned_figures([output_dir, extras, *folders, *given])
    return Section("More figures", figures=figures) if figures else None


def _missing(sweep: SweepResults) -> Section | None:
    seeds: dict[tuple[str, str, str], list[str]] = {}
    for run in sweep.runs:
        if run.problem is not None:
            seeds.setdefault((run.task, run.label, run.problem), []).append(str(run.seed))
    if not seeds:
        return None
    rows = [[task, label, ", ".join(of), why] for (task, label, why), of in seeds.items()]
    words = (
        f"{len(sweep.runs) - len(sweep.done)} of {len(sweep.runs)} runs have no results and are "
        "left out above. `fusedacl sweep` with the same recipe and directory continues with them."
    )
    return Section("Missing runs", words, tables=[Table(["task", "method", "seeds", "why"], rows)])


def _commands(sweep: SweepResults) -> Section:
    name = sweep.directory.resolve().name
    words = (
        f"All runs: `fusedacl sweep {name}/recipe.yaml --output_dir {name}`, then `fusedacl report "
        f"{name}`. Below, the command of each run; paths are relative to {name}/."
    )
    place = f"{sweep.directory.resolve()}/"
    commands = [command.replace(place, "") for command in _commands_of(sweep.done)]
    return Section("Commands", words, commands=commands)


def _commands_of(runs: Sequence[SweepRun]) -> list[str]:
    return [str(command) for run in runs if (command := run.results.get("command"))]


def _facts(sweep: SweepResults) -> dict[str, str]:
    """Data, base model, number of runs, training time and versions: name -> value."""
    seeds = ", ".join(map(str, sorted({run.seed for run in sweep.runs})))
    seconds = sum(float(run.results.get("train_seconds", 0)) for run in sweep.done)
    data = [f"{task} ({words})" if (words := _texts(sweep, task)) else task for task in sweep.tasks]
    # A second stage has the model of its first stage.
    models = dict.fromkeys(
        _model_name(run.options) for run in sweep.done if not run.options.get("stage1_model")
    )
    versions: dict[str, dict[str, None]] = {}
    for run in sweep.done:
        for package, number in run.results.get("versions", {}).items():
            versions.setdefault(package, {})[str(number)] = None
    numbers = [f"{package} {' and '.join(found)}" for package, found in versions.items()]
    duration = f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
    facts = {
        "Data": "; ".join(data),
        "Base model": ", ".join(models)
        or "that of the first stages, which are not among these runs",
        "Runs": f"{len(sweep.done)} of {len(sweep.runs)} done; seeds {seeds}",
        "Training time": f"{duration} in all" if seconds else "",
        "Versions": ", ".join(numbers),
    }
    facts = {name: words for name, words in facts.items() if words}
    return facts | {name.capitalize(): str(value) for name, value in sweep.environment.items()}


def _texts(sweep: SweepResults, task: str) -> str:
    """The splits of a task and limits on its texts: "validation; 10,000 training texts"."""
    words = [", ".join(sweep.splits(task))]
    for option, of_what in (
        ("max_train_samples", "training texts"),
        ("max_train_samples_per_class", "training texts of each class"),
        ("max_eval_samples", "evaluation texts"),
    ):
        limits = {run.options.get(option) or 0 for run in sweep.done if run.task == task}
        words += [f"{limit:,} {of_what}" for limit in sorted(limits - {0})]
    return "; ".join(word for word in words if word)


def _model_name(options: Mapping[str, Any]) -> str:
    """A hub name, or the last two parts of a path."""
    name = options.get("model_name_or_path")
    if name is None:
        return "all-MiniLM-L6-v2 (the demonstration's)"
    return "/".join(str(name).rstrip("/").split("/")[-2:])
