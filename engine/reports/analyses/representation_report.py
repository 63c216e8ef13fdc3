"""`fusedacl tsne`: figures and alignment of representations and label embeddings of runs.

Figure 6 of arXiv 2602.03563 has this form: a column per run, a row per exit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...config.commands import TSNEConfig
from ...experiments.runs import named_runs
from ...model.multi_exit import MultiExitConfig
from ...runtime import plots
from ...runtime.files import check_writable, write_whole
from ...runtime.text import csv_text, text_table, write_tables
from ..page.page import Figure, Section, Table, write_analysis
from .representations import Representations, choose_layers, measure_alignment, read_representations

TABLE_HEADER = (
    "run", "exit", "texts", "own label", "nearest other", "margin", "nearest is own", "silhouette",
)  # fmt: skip
_POINTS_HEADER = ("run", "exit", "what", "class", "x", "y")
# Without the star, which marks label embeddings. One fewer than colours, so that a colour that
# repeats has another marker.
_MARKERS = plots.MARKERS[:-1]
# With more classes, names and legend would cover the points.
MAX_NAMED_CLASSES = 20
NOTES = (
    "Cosines between representations and label embeddings, both normalised to length 1 as in the "
    "contrastive loss; dropout off. Margin: mean of the cosine to the own label embedding minus "
    "that to the nearest other. Silhouette: of the true classes, by cosine distance, texts only. "
    "None of these depends on t-SNE.",
    "t-SNE preserves neighbours; the sizes of groups and the distances between them have no "
    "meaning.",
)


def report_representations(runs: Sequence[Path], config: TSNEConfig) -> tuple[str, list[Path]]:
    """Draw and measure the exits of runs; returns as `write_representations`.

    Raises:
        ValueError: a run, exit or data set does not exist; `output_dir`, matplotlib or scikit-learn
            is missing; nothing can be written to `output_dir`; there are too few texts for the
            perplexity.
        FloatingPointError: a representation is NaN or infinite.
    """
    if config.tsne.output_dir is None:
        raise ValueError("output_dir is missing: name the directory for tables and figures.")
    check_writable(Path(config.tsne.output_dir), "output_dir", directory=True)
    plots.require_matplotlib()
    try:
        import sklearn.manifold  # noqa: F401
    except ImportError:
        raise ValueError("t-SNE needs scikit-learn. Run: pip install scikit-learn") from None
    named = named_runs(runs, config.tsne.labels)
    layers = choose_layers(config.tsne.exit_layers, [_exit_layers(run) for run in runs])
    exits = [
        one
        for run, (label, given) in zip(runs, named, strict=True)
        for one in read_representations(run, given, label, config, layers)
    ]
    for one in exits:
        check_perplexity(config.tsne.perplexity, len(one.samples), len(one.class_names))
    return write_representations(exits, config)


def check_perplexity(perplexity: float, num_samples: int, num_classes: int) -> None:
    """Check that there are enough points for a perplexity.

    t-SNE uses the 3 * perplexity nearest neighbours of each point (van der Maaten 2014).

    Raises:
        ValueError: there are too few; the message gives the largest perplexity that works.
    """
    points = num_samples + num_classes
    largest = (points - 1) // 3
    if perplexity > largest:
        raise ValueError(
            f"perplexity={perplexity:g} needs {math.ceil(3 * perplexity) + 1} points; there are "
            f"{num_samples} texts and {num_classes} label embeddings. The largest that works is "
            f"{largest}; or raise max_samples, where the split has more texts."
            if largest >= 1
            else f"perplexity={perplexity:g}: {points} points are too few for any."
        )


def embed(exit_of_run: Representations, perplexity: float, seed: int) -> np.ndarray:
    """t-SNE of the texts followed by the label embeddings, by cosine distance: [n + K, 2]."""
    from sklearn.manifold import TSNE

    points = np.concatenate([exit_of_run.samples, exit_of_run.label_embeddings])
    made = TSNE(metric="cosine", init="pca", perplexity=perplexity, random_state=seed)
    return made.fit_transform(points.astype(np.float32))


def write_representations(
    exits: Sequence[Representations], config: TSNEConfig
) -> tuple[str, list[Path]]:
    """Write tsne.png, .svg and .csv, representations.csv and .md, and index.html.

    exits: of one run after the other, on the same layers in all runs. Returns the table to print,
    and the files.
    """
    output_dir = Path(str(config.tsne.output_dir))
    points = [embed(one, config.tsne.perplexity, config.tsne.seed) for one in exits]
    output_dir.mkdir(parents=True, exist_ok=True)
    rows, findings = [], []
    for one in exits:
        found, texts = measure_alignment(one), len(one.samples)
        cosines = [f"{value:.4f}" for value in (found.own, found.nearest_other, found.margin)]
        share = f"{found.nearest_is_own:.1%}"
        silhouette = "" if found.silhouette is None else f"{found.silhouette:.4f}"
        rows.append([one.label, str(one.layer), str(texts), *cosines, share, silhouette])
        findings.append(
            f"{one.label}, exit {one.layer}: {share} of {texts} texts lie nearest to their own "
            f"label embedding; the mean margin of all is {cosines[2]} in cosine."
        )
    tables = write_tables(output_dir / "representations", TABLE_HEADER, rows, "\n\n".join(NOTES))
    tables.append(output_dir / "tsne.csv")
    write_whole(tables[-1], csv_text([_POINTS_HEADER, *_point_rows(exits, points)]))
    pictures = draw(exits, points, output_dir / "tsne")
    section = Section(
        "Representations",
        figures=[Figure(pictures[1], _caption(exits, config))],
        tables=[Table(TABLE_HEADER, rows)],
        notes=NOTES,
        files=[*pictures, *tables],
    )
    title = "Representations and label embeddings"
    files = write_analysis(output_dir, title, findings, section)
    return "\n".join([text_table(TABLE_HEADER, rows), "", *NOTES]), files


def draw(exits: Sequence[Representations], points: Sequence[np.ndarray], path: Path) -> list[Path]:
    """A column per run and a row per exit, or rows of three exits of a single run.

    Writes `path`.png and .svg. points: those of `embed` [n + K, 2] for each exit; label embeddings
    are stars.
    """
    from matplotlib.lines import Line2D

    num_rows = len({one.layer for one in exits})
    num_columns = len(exits) // num_rows
    is_one_run = num_columns == 1
    if is_one_run:
        num_columns = min(num_rows, plots.PANELS_PER_ROW)
        num_rows = math.ceil(num_rows / num_columns)
    figure = plots.new_figure(0.6 + 4.4 * num_columns, 0.9 + 4.0 * num_rows)
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    every = list(grid.flat if is_one_run else grid.T.flat)
    for axes, one, where in zip(every, exits, points, strict=False):
        _scatter(axes, one, where)
        axes.set_title(f"{one.label}, exit {one.layer}")
    for axes in every[len(exits) :]:
        axes.set_visible(False)
    names = exits[0].class_names
    if all(one.class_names == names for one in exits) and len(names) <= MAX_NAMED_CLASSES:
        handles, texts = grid[0][0].get_legend_handles_labels()
        star = Line2D([], [], marker="*", color="0.6", linestyle="", markeredgecolor="black")
        star.set_markersize(12)
        plots.legend_below(figure, [*handles, star], [*texts, "label embedding"])
    return plots.save_figure(figure, path)


def _scatter(axes: Any, one: Representations, where: np.ndarray) -> None:
    from matplotlib.patheffects import withStroke

    num_samples = len(one.samples)
    texts, stars = where[:num_samples], where[num_samples:]
    size = 18 if num_samples <= 400 else 9
    for index, name in enumerate(one.class_names):
        chosen, color = texts[one.classes == index], plots.look(index)["color"]
        marker = _MARKERS[index % len(_MARKERS)]
        axes.scatter(
            *chosen.T, s=size, color=color, alpha=0.55, linewidths=0, marker=marker, label=name
        )
    named = len(one.class_names) <= MAX_NAMED_CLASSES
    axes.margins(0.1)
    for index, (x, y) in enumerate(stars):
        color = plots.look(index)["color"]
        axes.scatter(
            x, y, s=300 if named else 90, marker="*", color=color, edgecolors="black", zorder=3
        )
    for index, (across, above) in enumerate(_name_places(where, stars) if named else ()):
        axes.annotate(
            one.class_names[index], stars[index], xytext=(0, 11 if above else -11),
            textcoords="offset points", ha=across, va="bottom" if above else "top", fontsize=9,
            fontweight="bold", zorder=4,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )  # fmt: skip
    # Coordinates of t-SNE have no meaning.
    axes.set_xticks([])
    axes.set_yticks([])


def _name_places(where: np.ndarray, stars: np.ndarray) -> list[tuple[str, bool]]:
    """For each star, the horizontal alignment of its name, and whether the name is above it."""
    low, extent = where.min(axis=0), np.ptp(where, axis=0)
    shares = (stars - low) / np.where(extent > 0, extent, 1)  # [K, 2], in [0, 1]
    places: list[tuple[str, bool]] = []
    order = np.arange(len(stars))
    for index, (x, y) in enumerate(shares):
        across = "left" if x < 0.15 else "right" if x > 0.85 else "center"
        # Only the highest of stars close together has its name above.
        near = (np.abs(shares - (x, y)) < (0.3, 0.12)).all(axis=1)
        higher = near & ((shares[:, 1] > y) | ((shares[:, 1] == y) & (order < index)))
        places.append((across, not higher.any()))
    return places


def _caption(exits: Sequence[Representations], config: TSNEConfig) -> str:
    data = dict.fromkeys(one.data for one in exits)
    sizes = dict.fromkeys(str(len(one.samples)) for one in exits)
    many = any(len(one.class_names) > MAX_NAMED_CLASSES for one in exits)
    unnamed = " Colours repeat and names are left out, as there are many classes." if many else ""
    return (
        f"t-SNE of the representations of {' or '.join(sizes)} texts ({'; '.join(data)}) by true "
        f"class, and of the label embeddings (stars). Cosine distance, perplexity "
        f"{config.tsne.perplexity:g}, seed {config.tsne.seed}, dropout off.{unnamed}"
    )


def _point_rows(
    exits: Sequence[Representations], points: Sequence[np.ndarray]
) -> Iterator[list[str]]:
    for one, where in zip(exits, points, strict=True):
        kinds = ["text"] * len(one.samples) + ["label embedding"] * len(one.class_names)
        classes = [*one.classes.tolist(), *range(len(one.class_names))]
        for kind, index, (x, y) in zip(kinds, classes, where, strict=True):
            name = one.class_names[index]
            yield [one.label, str(one.layer), kind, name, f"{x:.4f}", f"{y:.4f}"]


def _exit_layers(run: Path) -> list[int]:
    try:
        return list(MultiExitConfig.from_pretrained(run).exit_layers or [])
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"run {str(run)!r} has no config.json that can be read ({error}). Name a finished run "
            "or one of its checkpoint directories."
        ) from None
