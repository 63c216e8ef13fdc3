"""Tables of a sweep: scores of the full models, an ablation, and the values of an option.

They have the form of Tables 1 to 3 of arXiv 2602.03563. A mean over tasks is given only if every
task has a score; missing scores are listed below each table. Each section writes `path`.png, .svg,
.csv and .md, and is None if no run is done.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...experiments.report_plan import GridPlan, Target
from ...experiments.results import Seeds, SweepResults, grid_label, grid_value
from ...model.exit_policies import FixedLayer
from ...model.flops import exit_flops
from ...model.multi_exit import MultiExitConfig, MultiExitForSequenceClassification
from ...model.saved import DEFAULT_MAX_LENGTH
from ..page.page import Section, Table, write_section
from .findings import table_finding
from .score_figures import draw_dots, draw_values, metric_words
from .task_scores import (
    Column,
    Row,
    TaskScores,
    collect,
    common_tasks,
    finished,
    main_columns,
    planned_tasks,
    rows_of,
)

_COUNTS = (
    "Mean ± standard deviation (n - 1) over the seeds; a single seed has no deviation. Where a "
    "row's numbers of seeds differ, each is in brackets."
)
_BOLD = (
    "**Bold**: the best of its column, where the 95 % t interval of its lead over the second, seed "
    "by seed, is above 0."
)


def ablation_section(
    sweep: SweepResults, targets: Mapping[str, Target], metric: str | None, path: Path
) -> Section | None:
    """Cross-layer averages by task and the differences to the first row (Table 2)."""
    rows = rows_of(sweep, targets)
    planned = planned_tasks(sweep, rows)
    tasks = common_tasks(sweep, rows) or list(planned)
    columns = main_columns(sweep, tasks, metric)
    scores = collect(sweep, rows, columns, lambda _, column, run: run.average(column.metric))
    if not scores:
        return None
    header = ["method", "seeds"]
    for column in columns:
        header += [column.label, "difference"]
    several = len(columns) > 1
    header += ["mean of tasks", "difference"] if several else []
    lines = []
    for row in rows:
        line = [row.label, scores.counts(row)]
        for column in columns:
            line += [scores.cell(row, column), scores.difference(row, column)]
        lines.append([*line, scores.over_tasks(row), scores.gain(row)] if several else line)
    words = (
        f"Average score over the layers of all exits, in percent ({scores.metrics()}). "
        f"Difference: to {rows[0].label}, in points. {_COUNTS} {_BOLD}"
    )
    notes = scores.notes() + [
        f"Not in the table: {task}, for which the recipe runs {', '.join(labels)} only."
        for task, labels in planned.items()
        if task not in tasks
    ]
    table = Table(header, lines, words)
    text = table_finding("Average over the exits", rows[0].label, scores.by_row())
    drawn = _draw(scores, "Average score over the exits (%)", path)
    return write_section(path, "Ablation", table, *drawn, notes, scores.numbers(), text)


def full_model_section(
    sweep: SweepResults,
    targets: Mapping[str, Target],
    metric: str | None,
    path: Path,
    all_metrics: bool = False,
) -> Section | None:
    """Scores of last or named exits by task, with their operations (Table 1).

    `all_metrics`: a column for every metric of a task, beside the main one's.
    """
    rows = rows_of(sweep, targets)
    tasks, common = list(planned_tasks(sweep, rows)), common_tasks(sweep, rows)
    columns: list[Column] = []
    for main in main_columns(sweep, tasks, metric):
        names = dict.fromkeys([main.metric, *(sweep.metrics(main.task) if all_metrics else ())])
        splits = sweep.splits(main.task)
        for split, name in itertools.product(splits, names):
            label = main.task
            if split != splits[0]:
                label += f", {split.removeprefix('validation_')}"
            if name != main.metric:
                label += f", {metric_words(name)}"
            counts = label == main.task and main.task in common
            columns.append(Column(main.task, split, name, label, counts))
    scores = collect(
        sweep,
        rows,
        columns,
        lambda row, column, run: run.score(column.metric, row.layer, column.split),
    )
    if not scores:
        return None
    flops, flops_words, flops_notes = _flops(sweep, rows, tasks)
    header = ["method", "seeds", *(("GFLOPs", "share") if flops_words else ())]
    header += [column.label for column in columns]
    several = len(scores.counted) > 1
    if several:
        header.append("mean of tasks" if common == tasks else f"mean of {', '.join(common)}")
    lines = []
    for row in rows:
        line = [row.label, scores.counts(row), *(flops[row.label] if flops_words else ())]
        line += [scores.cell(row, column) for column in columns]
        lines.append([*line, scores.over_tasks(row)] if several else line)
    words = (
        f"Score of the last exit, or of the exit that a row names, in percent "
        f"({scores.metrics()}). {f'{flops_words} ' if flops_words else ''}{_COUNTS} {_BOLD}"
    )
    text = table_finding("Full models", rows[0].label, scores.by_row())
    table, notes = Table(header, lines, words), [*scores.notes(), *flops_notes]
    drawn = _draw(scores, "Score (%)", path)
    return write_section(path, "Full models", table, *drawn, notes, scores.numbers(), text)


def grid_section(
    sweep: SweepResults, plan: GridPlan, metric: str | None, path: Path
) -> Section | None:
    """Cross-layer averages by the value of an option (Table 3), as a table and as lines."""
    # Line -> value -> row; the values of further listed options make separate lines.
    points: dict[str, dict[str, Row]] = {}
    # Methods may write the same number differently.
    written: dict[Any, str] = {}
    for name, target in plan.methods.items():
        for row in rows_of(sweep, {name: target}):
            others = tuple(pair for pair in row.grid if pair[0] != plan.option)
            given = dict(row.grid)[plan.option]
            value = written.setdefault(grid_value(given), str(given))
            points.setdefault(grid_label(name, others), {})[value] = row
    rows = [row for of_line in points.values() for row in of_line.values()]
    tasks = list(planned_tasks(sweep, rows))
    columns = main_columns(sweep, tasks, metric)
    scores = collect(sweep, rows, columns, lambda _, column, run: run.average(column.metric))
    if not scores:
        return None
    header = [plan.option]
    for column in columns:
        header += points if len(columns) == 1 else [f"{column.task}: {line}" for line in points]
    lines = []
    for value in dict.fromkeys(value for of_line in points.values() for value in of_line):
        cells = [
            scores.at(of_line[value], column) if value in of_line else Seeds()
            for column in columns
            for of_line in points.values()
        ]
        words = [f"{seeds.words} ({len(seeds)})" if seeds else "" for seeds in cells]
        lines.append([value, *words])
    caption_of_table = (
        f"Average score over the layers of all exits, in percent ({scores.metrics()}), by "
        f"{plan.option}. Mean ± standard deviation (n - 1), in brackets the number of seeds."
    )
    notes = scores.notes()
    done = [run for row in rows for task in tasks for run in finished(sweep, task, row)]
    if all(len(run.layers()) == 1 for run in done):
        notes.insert(0, "Each of these runs has one exit: its score is the average.")
    figures = draw_values(
        {
            column.task: {
                line: [(value, scores.at(row, column)) for value, row in of_line.items()]
                for line, of_line in points.items()
            }
            for column in columns
        },
        plan.option,
        "average over the exits (%)",
        path,
    )
    caption = (
        f"Average score over the exits by {plan.option}: mean over the seeds, and the range from "
        "the lowest to the highest seed. The values are evenly spaced, whatever their size."
    )
    table, title = Table(header, lines, caption_of_table), f"Values of {plan.option}"
    return write_section(path, title, table, figures, caption, notes, scores.numbers())


def _draw(scores: TaskScores, axis: str, path: Path) -> tuple[list[Path], str]:
    dots = {
        column.label: [(row.label, scores.at(row, column)) for row in scores.rows]
        for column in scores.columns
    }
    return draw_dots(dots, axis, path), f"{axis}. Large: mean over the seeds; small: each seed."


def operations(directory: Path, layer: int | None = None) -> tuple[float, int]:
    """FLOPs of a saved model on a text of its max_seq_length tokens, and that length.

    The weights are not read. `layer`: the exit that the model is cut off at; None: the last one.

    Raises:
        ValueError: there is no model, it has no such exit, or its encoder is not supported.
    """
    if not (directory / "config.json").is_file():
        raise ValueError("no model is saved with the run")
    config = MultiExitConfig.from_pretrained(directory)
    length = int(config.max_seq_length or DEFAULT_MAX_LENGTH)
    with torch.device("meta"):
        model = MultiExitForSequenceClassification(config)
    layer = model.exit_layers[-1] if layer is None else layer
    if layer not in model.exit_layers:
        raise ValueError(f"the model has no exit on layer {layer}")
    flops = exit_flops(model, FixedLayer(layer))[model.exit_layers.index(layer)]
    return float(flops.at(torch.tensor([length]))[0]), length


def _flops(
    sweep: SweepResults, rows: Sequence[Row], tasks: Sequence[str]
) -> tuple[dict[str, list[str]], str, list[str]]:
    """Row -> its two cells on operations; their explanation, empty if there are none; notes."""
    found: dict[tuple[str, str], float] = {}
    lengths: dict[str, int] = {}
    unread: dict[str, list[str]] = {}
    for row in rows:
        for task in tasks:
            for run in finished(sweep, task, row)[:1]:
                try:
                    found[row.label, task], lengths[task] = operations(run.directory, row.layer)
                except (ValueError, OSError) as error:
                    unread.setdefault(str(error), []).append(f"{row.label} on {task}")
    cells = {}
    for row in rows:
        here = {task: found[row.label, task] for task in tasks if (row.label, task) in found}
        most = {task: max(value for (_, of), value in found.items() if of == task) for task in here}
        cells[row.label] = [
            _range([f"{value / 1e9:.2f}" for value in here.values()]),
            _range([f"{value / most[task]:.0%}" for task, value in here.items()]),
        ]
    texts = "; ".join(
        f"{length} on {', '.join(task for task in lengths if lengths[task] == length)}"
        for length in dict.fromkeys(lengths.values())
    )
    words = (
        f"GFLOPs: matrix products on one text of max_seq_length tokens ({texts}), a multiply and "
        "an add being two, of a model that ends with that exit; share: of the largest in the table."
    )
    notes = [
        f"No FLOPs for {'; '.join(which) if found or len(unread) > 1 else 'any run'}: {error}."
        for error, which in unread.items()
    ]
    return cells, words if texts else "", notes


def _range(words: Sequence[str]) -> str:
    ordered = sorted(set(words), key=lambda word: float(word.rstrip("%")))
    return "".join(ordered) if len(ordered) < 2 else f"{ordered[0]} to {ordered[-1]}"
