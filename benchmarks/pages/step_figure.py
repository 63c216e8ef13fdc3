"""Figure of the step suite: the parts of a step of our trainers."""

from pathlib import Path

from ...engine.runtime.plots import COLORS, legend_below, new_figure, plain, save_figure
from ...engine.runtime.profiler_marks import OTHER
from ...engine.runtime.profiler_marks import WORDS as PARTS
from ..measuring.environment import Result
from ..suites.step.names import WORDS

# Smaller shares get no number.
MIN_NUMBER = 0.045
PART_COLORS = dict(zip(PARTS, COLORS, strict=False)) | {OTHER: "#dddddd"}


def with_parts(result: Result) -> list[tuple[str, dict[str, Result]]]:
    """Words of each case with profiles, and its trainers that have one."""
    cases = [
        (case["words"], {name: row for name, row in case["providers"].items() if "shares" in row})
        for case in result["cases"]
    ]
    return [(words, rows) for words, rows in cases if rows]


def draw(result: Result, path: Path) -> None:
    """Draw path.png: a bar per profiled trainer, as long as its median step; nothing without."""
    from matplotlib.patches import Patch

    cases = with_parts(result)
    if not cases:
        return
    heights = [len(rows) for _, rows in cases]
    figure = new_figure(11, 0.45 * sum(heights) + 0.9 * len(cases) + 1.5)
    panels = figure.subplots(len(cases), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (words, rows) in zip(panels, cases, strict=True):
        for place, row in enumerate(rows.values()):
            left = 0.0
            for part, color in PART_COLORS.items():
                share = row["shares"][part]
                width = share * row["p50_ms"]
                axes.barh(place, width, left=left, color=color, height=0.7)
                if share >= MIN_NUMBER:
                    axes.text(
                        left + width / 2, place, f"{share:.0%}", ha="center", va="center",
                        fontsize=8, color="white" if part != OTHER else "black",
                    )  # fmt: skip
                left += width
        labels = [WORDS[name].removeprefix("fusedacl, ") for name in rows]
        axes.set_yticks(range(len(rows)), labels, fontsize=9)
        axes.invert_yaxis()
        axes.set_title(words, loc="left", fontsize=10)
        plain(axes)
        axes.set_axisbelow(True)
    panels[-1].set_xlabel("milliseconds per step (median); shares as profiled")
    handles = [Patch(color=PART_COLORS[part]) for part in PARTS]
    legend_below(figure, handles, list(PARTS.values()))
    cpu, threads = result["environment"]["cpu"], result["environment"]["threads"]
    figure.suptitle(
        f"Parts of a training step: {cpu}, {threads} thread{'' if threads == 1 else 's'}, float32",
        fontsize=11,
    )
    save_figure(figure, path, (".png",))
