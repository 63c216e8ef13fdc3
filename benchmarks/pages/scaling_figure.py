"""The figure of `scaling`: time, memory and bytes of a rank against the number of ranks."""

from pathlib import Path
from typing import Any

from ...engine.runtime.plots import save_figure
from ..measuring.environment import Result
from ..suites.scaling.cost_model import WORDS
from ..suites.scaling.options import CPU_PRESET

# Colour, line style and width; the last two lines may lie on the first.
STYLES: dict[str, tuple[str, str, float]] = {
    "ours": ("#55a868", "-", 3.0),
    "gather_all": ("#c44e52", "-", 1.5),
    "gather_rows": ("#dd8452", "--", 1.5),
    "ring": ("#4c72b0", "-.", 1.5),
}
PANELS = (
    ("ms", 1.0, "milliseconds"),
    ("memory_bytes", 1e6, "peak memory (MB)"),
    ("sent_bytes", 1e6, "sent, and received (MB)"),
)
NOT_MEASURED = "data sheets, not measured"


def draw(result: Result, directory: Path) -> list[str]:
    """scaling.png and scaling.svg: one row of panels a preset, the measured points on the CPU's."""
    from matplotlib.figure import Figure

    models = result["models"]
    figure = Figure(figsize=(12, 3.4 * len(models) + 0.9), layout="constrained")
    grid = figure.subplots(len(models), len(PANELS), squeeze=False)
    for model, axes_row in zip(models, grid, strict=True):
        is_cpu = model["preset"] == CPU_PRESET
        for (key, unit, words), axes in zip(PANELS, axes_row, strict=True):
            draw_lines(axes, model, key, unit)
            if is_cpu:
                draw_measured(axes, result["measured"], key, unit)
            if key == "memory_bytes":
                draw_limits(axes, model)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xlabel("ranks")
            axes.set_ylabel(words)
            axes.spines[["top", "right"]].set_visible(False)
        name = model["assumptions"]["name"]
        rates = model["assumptions"]["source"].split(";")[0] if is_cpu else NOT_MEASURED
        dtype = "float32" if model["element_bytes"] == 4 else "float16"
        axes_row[0].set_title(
            f"{result['machine'] if is_cpu else name}"
            f"{', gloo on loopback' if is_cpu else ''} ({dtype}; {rates})",
            loc="left",
            fontsize=11,
        )
    handles, _ = grid[0][0].get_legend_handles_labels()
    handles, names = handles[: len(STYLES)], [WORDS[method] for method in STYLES]
    if any(model["preset"] == CPU_PRESET for model in models):
        handles += [_marker("o"), _marker("x")]
        names += ["measured", "model at the rates of as many ranks"]
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    shape = result["problem"]
    figure.suptitle(
        f"Contrastive loss over all ranks, forward + backward, of a rank: N = {shape['samples']} "
        f"samples, K = {shape['labels']}, d = {shape['width']}\n"
        "Lines: model, faint where the method has no room"
    )
    directory.mkdir(parents=True, exist_ok=True)
    return [file.name for file in save_figure(figure, directory / "scaling")]


def _marker(shape: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], marker=shape, linestyle="", color="#444444", fillstyle="none")


def draw_lines(axes: Any, model: Result, key: str, unit: float) -> None:
    """Faint where the method has no room on the device."""
    limit = model["assumptions"]["memory_bytes"]
    for method, (color, style, width) in STYLES.items():
        rows = [row for row in model["rows"] if row["method"] == method and row[key] > 0]
        fitting = [row for row in rows if row["memory_bytes"] <= limit]
        for part, alpha in ((rows, 0.3), (fitting, 1.0)):
            axes.plot(
                [row["ranks"] for row in part],
                [row[key] / unit for row in part],
                style,
                color=color,
                linewidth=width,
                alpha=alpha,
                label=method if part is fitting else "_",
            )


def draw_measured(axes: Any, measured: list[Result], key: str, unit: float) -> None:
    for found in measured:
        for method, (color, _, _) in STYLES.items():
            of_method = found["methods"][method]
            value = of_method["times"]["p50_ms"] if key == "ms" else of_method[key]
            if value:
                axes.plot(found["ranks"], value / unit, "o", color=color, fillstyle="none")
            if key == "ms":
                axes.plot(found["ranks"], of_method["model_ms"], "x", color=color)


def draw_limits(axes: Any, model: Result) -> None:
    for value, words in (
        (model["assumptions"]["memory_bytes"], "the rank's memory"),
        (model["crossovers"]["budget_bytes"], "budget"),
    ):
        axes.axhline(value / 1e6, color="#888888", linestyle=":", linewidth=1)
        axes.text(1, value / 1e6, f"{words}, {value / 1e9:.3g} GB", va="bottom", fontsize=8)
