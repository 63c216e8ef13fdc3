"""Early exit of several runs in one table, from the files of `fusedacl exits` in RUN/exits.

Beside a setting the times of its export in RUN/onnx, where that was made with --measure.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...experiments.results import SweepRun
from ...inference.calibration.guarantee import short as guarantee_short
from ...inference.calibration.guarantee import words as guarantee_words
from ...inference.calibration.search import AREA_WORDS
from ...inference.export.onnx_early_exit import EXPORT_FILE
from ...runtime.plots import legend_below, look, new_figure, plain, save_figure
from ..page.page import Figure, Section, Table, write_section
from .score_figures import metric_words

# Columns of the table; a batch size follows those of times.
GUARANTEE, SPEED_UP, ONNX_SPEED_UP = "guarantee", "speed-up, batch ", "onnxruntime, batch "
EXITS_FILE = Path("exits") / "exits.json"
ONNX_FILE = Path("onnx") / EXPORT_FILE


@dataclasses.dataclass(frozen=True)
class _Mark:
    """A policy's chosen setting, and the settings that were timed: operations and difference."""

    label: str
    policy: str
    share: float
    difference: float
    tried: list[tuple[float, float]]


def exits_section(
    runs: Mapping[str, Sequence[SweepRun]], data: str, path: Path, title: str
) -> Section | None:
    """The chosen setting of each policy, with scores and operations; runs: label -> seeds.

    Writes `path`.png, .svg, .csv, .md. None if no run holds an exits.json.
    """
    notes: list[str] = []
    found = [
        (label, run, study)
        for label, group in runs.items()
        for run in group
        if (study := _read(run, label, notes)) is not None
    ]
    if not found:
        return None
    policies = [facts for _, _, study in found for facts in study["policies"].values()]
    timed = {speed["batch_size"] for facts in policies for speed in facts.get("measured", ())}
    sizes = sorted(timed)
    header = ["method", "seed", "policy", "setting", "score", "cross-fitted", "full model"]
    header += ["mean layer", "FLOPs", "area", GUARANTEE]
    header += [f"{SPEED_UP}{size}" for size in sizes]
    exported = {
        run.directory: _onnx_speeds(run, study, label, notes) for label, run, study in found
    }
    onnx_sizes = sorted({size for _, speeds in exported.values() for size in speeds})
    header += [f"{ONNX_SPEED_UP}{size}" for size in onnx_sizes]
    rows = []
    marks: list[_Mark] = []
    for label, run, study in found:
        full = study["full_score"]
        for policy, facts in study["policies"].items():
            if "calibration" not in facts:
                notes.append(f"{label}, seed {run.seed}: {policy} did not reach the target.")
                continue
            chosen = facts["calibration"]
            setting = " ".join(f"{k}={v:.4g}" for k, v in facts["parameters"].items())
            # The score on texts that the setting was not chosen on, if there is one.
            unseen = (chosen.get("cross_fitted") or {}).get("score")
            percent = [
                "" if value is None else f"{100 * value:.1f}"
                for value in (chosen["score"], unseen, full, facts.get("area_under_curve"))
            ]
            costs = [f"{chosen['mean_layer']:.2f}", f"{chosen['flops_share']:.0%}", percent.pop()]
            promise = chosen.get("guarantee")
            costs += [guarantee_short(promise) if promise else ""]
            speeds = {speed["batch_size"]: speed["speedup"] for speed in facts.get("measured", ())}
            times = [f"{speeds[size]:.2f}x" if size in speeds else "" for size in sizes]
            served, speeds = exported[run.directory]
            speeds = speeds if served == policy else {}
            times += [f"{speeds[size]:.2f}x" if size in speeds else "" for size in onnx_sizes]
            if promise:
                where = f"{label}, seed {run.seed}, {policy.replace('_', ' ')}"
                notes.append(f"{where}: {guarantee_words(promise)}")
            row = [label, str(run.seed), policy.replace("_", " "), setting]
            rows.append([*row, *percent, *costs, *times])
            best = chosen["score"] if unseen is None else unseen
            tried = [(each["flops_share"], each["score"] - full) for each in facts.get("timed", ())]
            marks.append(_Mark(label, policy, chosen["flops_share"], best - full, sorted(tried)))
    metric = metric_words(found[0][2]["metric"])
    words = (
        f"The setting that `fusedacl exits` chose for each policy on {data}: {metric} in percent, "
        "beside the full model's; FLOPs as a share of the full model's. A row per run and policy. "
        "Score: on the texts that the setting was chosen on; cross-fitted: on texts that it was "
        f"not chosen on. Area: the policy's {AREA_WORDS}."
    )
    if any("guarantee" in facts.get("calibration", ()) for facts in policies):
        words += " Guarantee: the largest share lost, and the confidence; the notes say of what."
    if not rows:
        return Section(title, words, notes=notes)
    if sizes or onnx_sizes:
        words += " Speed-up: measured against the full model in PyTorch, in turns."
    for name in ("cross-fitted", "area", GUARANTEE):
        place = header.index(name)
        if not any(row[place] for row in rows):
            for row in [header, *rows]:
                del row[place]
    caption = (
        f"Difference in {metric} to the full model against operations on {data}, a mark per policy "
        "and run at the chosen setting; cross-fitted scores where there are any. Lines join the "
        "settings that were timed, with scores on the texts of the choice. Up and to the left is "
        "better; the full model is at 100 % and 0."
    )
    curve_words = (
        f"the best settings of each policy on {data}, against operations and, where they were "
        "timed, measured speed."
    )
    curves = [
        Figure(picture, f"{label}, seed {run.seed}: {curve_words}")
        # One per method; those of other seeds lie beside their runs.
        for label, run in {label: run for label, run, _ in reversed(found)}.items()
        if (picture := run.directory / "exits" / "exits.svg").is_file()
    ][::-1]
    table = Table(header, rows, words)
    section = write_section(path, title, table, _draw(marks, metric, path, title), caption, notes)
    return dataclasses.replace(section, figures=[*section.figures, *curves])


def _read(run: SweepRun, label: str, notes: list[str]) -> dict[str, Any] | None:
    """The study of a run; None if there is none, or it is damaged, which is added to `notes`."""
    file = run.directory / EXITS_FILE
    try:
        study = json.loads(file.read_text(encoding="utf-8"))
        study["metric"], 0 * study["full_score"]
        for policy in study["policies"].values():
            policy.items()
            if "calibration" in policy:
                policy["parameters"].items()
                0.0 * policy.get("area_under_curve", 0)
                for setting in (policy["calibration"], *policy.get("timed", ())):
                    0 * setting["score"] * setting["flops_share"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        notes.append(f"{label}, seed {run.seed}: its {EXITS_FILE} is damaged and left out.")
        return None
    return dict(study)


def _onnx_speeds(
    run: SweepRun, study: Mapping[str, Any], label: str, notes: list[str]
) -> tuple[str | None, dict[int, float]]:
    """The policy of a run's export, and batch size -> how much faster than the full model it is.

    The export of another setting than the study chose, or of another model, has a note instead.
    """
    where = f"{label}, seed {run.seed}"
    try:
        record = json.loads((run.directory / ONNX_FILE).read_text(encoding="utf-8"))
        speeds = record.get("measured", {}).get("speed", ())
        found = {int(each["batch_size"]): each["full_ms"] / each["onnx_ms"] for each in speeds}
        name, parameters = str(record["policy"]["name"]), dict(record["policy"]["parameters"])
        quantize = str(record["quantize"])
    except FileNotFoundError:
        return None, {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        notes.append(f"{where}: its {ONNX_FILE} is damaged and left out.")
        return None, {}
    facts = study["policies"].get(name, {})
    problem = None
    if quantize != "none":
        problem = f"with {quantize} weights it is another model than that of the table"
    elif "calibration" not in facts or facts["parameters"] != parameters:
        setting = " ".join(f"{key}={value}" for key, value in parameters.items())
        problem = f"its policy, {name.replace('_', ' ')} {setting}, is in no row of the table"
    if found and problem is not None:
        notes.append(
            f"{where}: the times of the export in {ONNX_FILE.parent} are left out: {problem}."
        )
        return None, {}
    return name, found


def _draw(marks: Sequence[_Mark], metric: str, path: Path, title: str) -> list[Path]:
    labels = list(dict.fromkeys(mark.label for mark in marks))
    policies = list(dict.fromkeys(mark.policy for mark in marks))
    figure = new_figure(7.5, 4.6)
    axes = figure.subplots()
    for mark in marks:
        place, marker = labels.index(mark.label), look(policies.index(mark.policy))["marker"]
        style = look(place) | {"marker": marker, "markersize": 7, "alpha": 0.8, "linestyle": ""}
        if mark.tried:
            thin = style | {"markersize": 3, "alpha": 0.5, "linestyle": "-", "linewidth": 0.8}
            shares, differences = 100 * np.array(mark.tried).T
            axes.plot(shares, differences, **thin, gid=f"series-{place}-{len(axes.lines)}")
        gid = f"series-{place}-{len(axes.lines)}"
        axes.plot(100 * mark.share, 100 * mark.difference, **style, gid=gid)
    axes.axhline(0, color="#000000", linewidth=0.8, linestyle="--")
    axes.axvline(100, color="#000000", linewidth=0.8, linestyle="--")
    axes.set(xlim=(0, None), xlabel="operations per text (% of the full model's FLOPs)")
    low, high = axes.get_ylim()
    if high - low < 1:
        # Else rounding would be drawn as a difference.
        axes.set_ylim((low + high) / 2 - 0.5, (low + high) / 2 + 0.5)
    axes.set_ylabel(f"{metric}: difference to the full model (points)")
    axes.set_title(title, fontsize=11)
    plain(axes)
    # Methods before policies, so that the numbers of their legend entries are those of the series.
    handles: list[Any] = []
    for index in range(len(labels)):
        handles += axes.plot([], [], color=look(index)["color"], linewidth=4)
    for index in range(len(policies)):
        handles += axes.plot([], [], **look(index) | {"color": "#7d7d7d"}, linestyle="")
    legend_below(figure, handles, [*labels, *(name.replace("_", " ") for name in policies)])
    return save_figure(figure, path)
