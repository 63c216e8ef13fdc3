"""Figure of the scaling suite: time, memory and bytes of a rank against the number of ranks."""

from pathlib import Path
from typing import Any

from ...engine.runtime.plots import COLORS, legend_below, new_figure, plain, save_figure
from ..measuring.environment import Result
from ..suites.scaling.cost_model import WORDS
from ..suites.scaling.suite import CPU_MODEL

# Lines of different methods may coincide.
STYLES: dict[str, dict[str, Any]] = {
    "ours": {"linestyle": "-", "linewidth": 3.0, "color": COLORS[0]},
    "gather_all": {"linestyle": "-", "linewidth": 1.5, "color": COLORS[1]},
    "gather_rows": {"linestyle": "--", "linewidth": 1.5, "color": COLORS[2]},
    "ring": {"linestyle": "-.", "linewidth": 1.5, "color": COLORS[3]},
}
PANELS = (
    ("ms", 1.0, "milliseconds"),
    ("memory_bytes", 1e6, "peak memory (MB)"),
    ("sent_bytes", 1e6, "sent, and received (MB)"),
)


def draw(result: Result, path: Path) -> None:
    """Draw path.png: panels per modelled machine, with the measured points of this CPU."""
    from matplotlib.lines import Line2D

    models = result["models"]
    figure = new_figure(12, 3.4 * len(models) + 1.2)
    grid = figure.subplots(len(models), len(PANELS), squeeze=False)
    for model, axes_row in zip(models, grid, strict=True):
        machine, is_cpu = model["assumptions"], model["preset"] == CPU_MODEL
        for (key, unit, words), axes in zip(PANELS, axes_row, strict=True):
            _draw_lines(axes, model, key, unit)
            if is_cpu:
                _draw_measured(axes, result["measured"], key, unit)
            if key == "memory_bytes":
                _draw_limit(axes, machine["memory_bytes"], "the rank's memory")
                _draw_limit(axes, model["crossovers"]["budget_bytes"], "budget")
            axes.set_xscale("log", base=2)
            axes.set(yscale="log", xlabel="ranks", ylabel=words)
            plain(axes)
        name = f"{path.parent.name}, gloo on loopback" if is_cpu else machine["name"]
        dtype = "float32" if model["element_bytes"] == 4 else "float16"
        source = machine["source"].split(";")[0]
        axes_row[0].set_title(f"{name} ({dtype}; {source})", loc="left", fontsize=11)
    handles = [Line2D([], [], **style) for style in STYLES.values()]
    handles += [
        Line2D([], [], marker=shape, linestyle="", color="#444444", fillstyle="none")
        for shape in "ox"
    ]
    names = [WORDS[method] for method in STYLES]
    legend_below(figure, handles, [*names, "measured", "model at the rates of as many ranks"])
    words = "N = {samples} samples, K = {labels}, d = {width}".format(**result["problem"])
    figure.suptitle(
        f"Contrastive loss over all ranks, forward + backward, per rank: {words}\n"
        "Lines: by the model, faint beyond the rank's memory"
    )
    save_figure(figure, path, (".png",))


def _draw_lines(axes: Any, model: Result, key: str, unit: float) -> None:
    limit = model["assumptions"]["memory_bytes"]
    for method, style in STYLES.items():
        rows = [row for row in model["rows"] if row["method"] == method and row[key] > 0]
        fitting = [row for row in rows if row["memory_bytes"] <= limit]
        for part, alpha in ((rows, 0.3), (fitting, 1.0)):
            ranks, values = [row["ranks"] for row in part], [row[key] / unit for row in part]
            axes.plot(ranks, values, alpha=alpha, **style)


def _draw_measured(axes: Any, measured: list[Result], key: str, unit: float) -> None:
    for found in measured:
        for method, style in STYLES.items():
            row, color = found["methods"][method], style["color"]
            value = row["times"]["p50_ms"] if key == "ms" else row[key]
            if value:
                axes.plot(found["ranks"], value / unit, "o", color=color, fillstyle="none")
            if key == "ms":
                axes.plot(found["ranks"], row["model_ms"], "x", color=color)


def _draw_limit(axes: Any, num_bytes: float, words: str) -> None:
    axes.axhline(num_bytes / 1e6, color="#888888", linestyle=":", linewidth=1)
    axes.text(1, num_bytes / 1e6, f"{words}, {num_bytes / 1e9:.3g} GB", va="bottom", fontsize=8)
