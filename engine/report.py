"""Figures and tables from the files that runs left."""

from __future__ import annotations

import argparse
import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .options import write_whole
from .tracking import read_records

# What the runs of one table may differ in.
_FREE_OPTIONS = ("objective", "gate", "seed")
OBJECTIVE_NAMES = {"ce": "CE", "scl": "CE+SCL", "acl": "ACL"}
_COLORS = {"ce": "#4c72b0", "scl": "#dd8452", "acl": "#55a868"}


def require_matplotlib() -> None:
    """Check that figures can be drawn, before any work.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("Figures need matplotlib. Run: pip install 'fusedacl[demo]'") from None


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl.

    Raises:
        ValueError: the directory has none.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{str(run)!r} holds no metrics.jsonl: it is not a run of fusedacl.")
    return read_records(path)


def draw_loss_curves(runs: Mapping[str, Path], path: Path) -> Path:
    """Training and validation cross-entropy of several runs against the epoch, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for objective, run in runs.items():
        records = read_metrics(run)
        steps = [record for record in records if record["split"] == "train"]
        epochs = np.array([record["epoch"] for record in steps])
        losses = np.array([record["loss_ce"] for record in steps])
        name, color = OBJECTIVE_NAMES[objective], _COLORS[objective]
        axes.plot(epochs, losses, color=color, alpha=0.2, linewidth=0.8)
        axes.plot(*_running_mean(epochs, losses), color=color, label=f"{name}, training")
        evaluations = [record for record in records if record["split"] != "train"]
        last = max((record["exit"] for record in evaluations), default=None)
        evaluations = [record for record in evaluations if record["exit"] == last]
        if evaluations:
            axes.plot(
                [record["epoch"] for record in evaluations],
                [record["metrics"]["loss"] for record in evaluations],
                "o--",
                color=color,
                label=f"{name}, {evaluations[0]['split']}",
            )
    axes.set_xlabel("epoch")
    axes.set_ylabel("cross-entropy (nats)")
    axes.set_ylim(bottom=0)
    axes.set_title("Cross-entropy; thick: mean of 15 steps")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    return path


def _running_mean(x: np.ndarray, y: np.ndarray, width: int = 15) -> tuple[np.ndarray, np.ndarray]:
    width = min(width, len(y))
    return x[width - 1 :], np.convolve(y, np.full(width, 1 / width), mode="valid")


def draw_angle_histogram(run: Path, path: Path, max_angle: float = 90.0) -> Path:
    """Angles between the cross-entropy and the contrastive gradient, by epoch, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # One angle a step, or one for each exit and for what they share.
    logged = [
        (value, record["epoch"])
        for record in read_metrics(run)
        for name, value in record.items()
        if name.startswith("angle_degrees") and value is not None
    ]
    if not logged:
        raise ValueError(f"{str(run)!r} logged no gradient angle: it ran without the gate.")
    angles = np.array([angle for angle, _ in logged])
    epochs = np.ceil([epoch for _, epoch in logged]).astype(int)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    low = 5 * np.floor(angles.min() / 5)
    high = 5 * np.ceil(max(angles.max(), max_angle + 5) / 5)
    shades = np.linspace(0.85, 0.35, len(set(epochs)))
    axes.hist(
        [angles[epochs == epoch] for epoch in sorted(set(epochs))],
        bins=np.arange(low, high + 1, 2.5).tolist(),
        stacked=True,
        color=[(0.33 * s, 0.66 * s + 0.2, 0.41 * s + 0.2) for s in shades],
        label=[f"epoch {epoch}" for epoch in sorted(set(epochs))],
    )
    axes.axvline(max_angle, color="#c44e52", linestyle="--", label=f"gate, {max_angle:g} degrees")
    dropped = (angles > max_angle).mean()
    axes.set_title(
        f"{len(angles)} angles, median {np.median(angles):.0f} degrees, {dropped:.1%} dropped"
    )
    axes.set_xlabel("angle between the cross-entropy and the contrastive gradient (degrees)")
    axes.set_ylabel("optimizer steps")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    return path


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell, the first to the left, the others to the right."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        first, *others = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join([first, *others]).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_tables(
    path: Path,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    words: str = "",
    numbers: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None,
) -> list[Path]:
    """A table as `path`.csv and `path`.md, the latter below `words`; returns both.

    `numbers`: header and rows of the CSV where they are not those of the page.
    """
    text = io.StringIO()
    of_csv = (header, rows) if numbers is None else numbers
    csv.writer(text, lineterminator="\n").writerows([of_csv[0], *of_csv[1]])
    files = [path.with_name(path.name + suffix) for suffix in (".csv", ".md")]
    write_whole(files[0], text.getvalue())
    intro = f"{words}\n\n" if words else ""
    write_whole(files[1], f"{intro}{markdown_table(header, rows)}\n")
    return files


def results_page(files: Sequence[Path]) -> str:
    """docs/results.md from the results.json files of runs: scores, gate, and exact commands.

    Raises:
        ValueError: a file is not a run's results, or nothing was given.
    """
    runs = sorted((_read_results(file) for file in files), key=_run_order)
    if not runs:
        raise ValueError("No results files: give the results.json of some runs.")
    parts = [
        "# Results on real data",
        "",
        "Made by `python -m fusedacl.engine.report` from the files in `docs/results/`; no number "
        "is typed by hand. Scores are those after the last step, in percent, mean ± standard "
        "deviation (n - 1) over the seeds; a single seed has no deviation. Within a data set the "
        "runs differ in objective, gate and seed only. The best mean is bold where it leads by "
        "more than the larger of the two deviations.",
    ]
    for data in dict.fromkeys(run["data"] for run in runs):
        parts += ["", *_data_section(data, [run for run in runs if run["data"] == data])]
    return "\n".join(parts) + "\n"


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
    lines = [f"## {data}"]
    for split in runs[0]["metrics"]:
        # The last exit is the model's answer.
        layer = list(runs[0]["metrics"][split])[-1]
        names = [name for name in runs[0]["metrics"][split][layer] if name != "loss"]
        scores = {
            (objective, name): [100 * run["metrics"][split][layer][name] for run in group]
            for objective, group in groups.items()
            for name in names
        }
        leaders = {name: leader({o: scores[o, name] for o in groups}) for name in names}
        rows = []
        for objective, group in groups.items():
            cells = [OBJECTIVE_NAMES[objective], str(len(group))]
            for name in names:
                words = _mean_and_deviation(scores[objective, name])
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


def _mean_and_deviation(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def leader(scores: dict[str, list[float]]) -> str | None:
    """The objective with the best mean, if its lead exceeds both deviations and seeds repeat."""
    order = sorted(scores, key=lambda objective: -statistics.mean(scores[objective]))
    if len(order) < 2 or min(len(values) for values in scores.values()) < 2:
        return None
    first, second = scores[order[0]], scores[order[1]]
    lead = statistics.mean(first) - statistics.mean(second)
    return order[0] if lead > max(_deviation(first), _deviation(second)) else None


def _verdicts(scores: dict[str, list[float]]) -> str:
    """ACL against each other objective, in words."""
    others = [objective for objective in scores if objective != "acl"]
    if "acl" not in scores or not others:
        return "nothing to compare."
    return " ".join(_verdict(other, scores["acl"], scores[other]) for other in others)


def _verdict(objective: str, acl: list[float], other: list[float]) -> str:
    difference = statistics.mean(acl) - statistics.mean(other)
    noise = max(_deviation(acl), _deviation(other))
    words = f"ACL - {OBJECTIVE_NAMES[objective]} = {difference:+.1f} points"
    if min(len(acl), len(other)) < 2:
        return f"{words}, one seed: no claim."
    if abs(difference) <= noise:
        return f"{words}, within the deviation ({noise:.1f}): ACL does not win."
    outcome = "ACL wins" if difference > 0 else "ACL loses"
    return f"{words}, more than the deviation ({noise:.1f}): {outcome}."


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
    """`python -m fusedacl.engine.report docs/results/*.json --output docs/results.md`."""
    parser = argparse.ArgumentParser(description="Write the results page from results.json files.")
    parser.add_argument("files", nargs="+", type=Path, help="results.json files of runs")
    parser.add_argument("--output", type=Path, required=True, help="the page to write")
    arguments = parser.parse_args()
    arguments.output.write_text(results_page(arguments.files), encoding="utf-8")


if __name__ == "__main__":
    main()
