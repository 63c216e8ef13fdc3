"""Section of the performance page for training steps."""

from ...engine.runtime.text import markdown_table
from ..floors.matrix_products import EXPLAINED
from ..measuring.environment import Result
from ..measuring.times_table import times_table
from ..suites.step.names import BARS, CACHED_WORDS, WORDS
from .cases import left_out_lines, noise_lines


def step_section(result: Result, figure: str | None = None, explain: bool = True) -> list[str]:
    """Every case with its trainers, the ratios beside their targets, and who was left out.

    figure: path of the figure relative to the page. explain: whether to describe the method.
    """
    lines = ["### A training step, float32"]
    if explain:
        lines += [
            "",
            "The trainers took turns of several steps, whose first ones are dropped; their losses "
            "without dropout were compared before anything was timed. Peak memory is that of "
            "gradients and activations: weights and optimizer state exist before and do not count. "
            f"{EXPLAINED}",
        ]
    for case in result["cases"]:
        table = times_table(case["providers"], names=WORDS | CACHED_WORDS)
        lines += ["", f"{case['words']}:", "", table]
        rows = [
            [
                found["what"],
                f"{found['value']:.2f}",
                f"{found['at_most']:.2f}",
                "yes" if found["met"] else "**no**",
                _ratio_of_products(found, case["providers"]),
            ]
            for found in case["bars"]
        ]
        if rows:
            header = ["ratio", "found", "at most", "met", "ratio of matrix products"]
            lines += ["", markdown_table(header, rows)]
    lines += left_out_lines(result["cases"])
    if figure is not None:
        lines += ["", f"![Parts of a training step]({figure})"]
    return [*lines, *noise_lines(result)]


def _ratio_of_products(found: Result, providers: dict[str, Result]) -> str:
    """The same ratio of counted FLOP, which has no noise."""
    for what, slower, faster, _ in BARS:
        if what == found["what"] and "flops" in providers[slower]:
            return f"{providers[slower]['flops'] / providers[faster]['flops']:.2f}"
    return "-"
