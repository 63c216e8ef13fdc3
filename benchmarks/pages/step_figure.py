"""The figure of `step`: where the time of a step of ours goes."""

from pathlib import Path

from ...engine.runtime.plots import save_figure
from ...engine.runtime.profiler_marks import (
    CE_BACKWARD,
    COMMUNICATION,
    CONTRASTIVE_BACKWARD,
    CONTRASTIVE_LOSS,
    DATA,
    FORWARD,
    GATE,
    OPTIMIZER,
    OTHER,
)
from ..measuring.environment import Result
from ..suites.step.names import WORDS

COLORS = {
    DATA: "#8c8c8c",
    FORWARD: "#4c72b0",
    CONTRASTIVE_LOSS: "#937860",
    CE_BACKWARD: "#dd8452",
    CONTRASTIVE_BACKWARD: "#55a868",
    GATE: "#c44e52",
    OPTIMIZER: "#8172b3",
    COMMUNICATION: "#64b5cd",
    OTHER: "#dddddd",
}
# Smaller shares have no number in the bar.
MIN_NUMBER = 0.045
NAMES = {
    DATA: "data",
    FORWARD: "forward",
    CONTRASTIVE_LOSS: "contrastive loss",
    CE_BACKWARD: "backward (CE, or both losses at once)",
    CONTRASTIVE_BACKWARD: "backward, contrastive alone",
    GATE: "gate: angle, combination",
    OPTIMIZER: "optimizer, clipping",
    COMMUNICATION: "communication",
    OTHER: "other",
}


def draw(result: Result, directory: Path, stem: str = "step") -> list[str]:
    """PNG and SVG of that name: a bar a provider of ours, as long as its median step."""
    from matplotlib.figure import Figure

    cases = [
        (case["words"], {name: row for name, row in case["providers"].items() if "shares" in row})
        for case in result["cases"]
    ]
    cases = [(words, rows) for words, rows in cases if rows]
    if not cases:
        return []
    heights = [len(rows) for _, rows in cases]
    figure = Figure(
        figsize=(11, 0.45 * sum(heights) + 0.9 * len(cases) + 1.5), layout="constrained"
    )
    panels = figure.subplots(len(cases), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (words, rows) in zip(panels, cases, strict=True):
        names = list(rows)
        for place, name in enumerate(names):
            row, left = rows[name], 0.0
            for part, color in COLORS.items():
                share = row["shares"][part]
                width = share * row["p50_ms"]
                axes.barh(place, width, left=left, color=color, label=part, height=0.7)
                if share >= MIN_NUMBER:
                    axes.text(
                        left + width / 2, place, f"{share:.0%}", ha="center", va="center",
                        fontsize=8, color="white" if part != OTHER else "black",
                    )  # fmt: skip
                left += width
        labels = [WORDS[name].removeprefix("fusedacl, ") for name in names]
        axes.set_yticks(range(len(names)), labels, fontsize=9)
        axes.invert_yaxis()
        axes.set_title(words, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("milliseconds a step (median); shares as profiled")
    handles, parts = panels[0].get_legend_handles_labels()
    found = dict(zip(parts, handles, strict=True))
    figure.legend(
        [found[part] for part in COLORS],
        [NAMES[part] for part in COLORS],
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=9,
    )
    cpu, threads = result["environment"]["cpu"], result["environment"]["threads"]
    figure.suptitle(
        f"Where a training step's time goes: {cpu}, "
        f"{threads} thread{'' if threads == 1 else 's'}, float32",
        fontsize=11,
    )
    directory.mkdir(parents=True, exist_ok=True)
    return [file.name for file in save_figure(figure, directory / stem)]
