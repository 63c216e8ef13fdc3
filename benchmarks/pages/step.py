"""The section of the performance page for `step`."""

from ...engine.runtime.text import markdown_table
from ..floors.matrix_products import EXPLAINED
from ..measuring.environment import Result
from ..suites.step.names import BARS, CACHED_WORDS, WORDS
from .cases import case_table, left_out_words


def step_section(result: Result, figure: str | None = None, explained: bool = True) -> list[str]:
    """Every case with its providers, the ratios beside what they should be, who was left out.

    figure: where it is, seen from the page. explained: whether how it was measured is said.
    """
    lines = ["### A training step, float32"]
    if explained:
        lines += [
            "",
            "The contestants took turns of several steps, whose first ones are left out; they "
            "trained alike without dropout before anything was timed. Peak memory is what a step "
            "takes beside weights and optimizer state: gradients and activations, by the "
            f"high-water mark of a process of its own. {EXPLAINED}",
        ]
    for case in result["cases"]:
        names = WORDS | CACHED_WORDS
        named = {names[name]: row for name, row in case["providers"].items()}
        lines += ["", f"{case['words']}:", "", case_table({**case, "providers": named})]
        rows = [
            [
                found["what"],
                f"{found['value']:.2f}",
                f"{found['at_most']:.2f}",
                _met(found),
                _by_products(found, case["providers"]),
            ]
            for found in case["bars"]
        ]
        if rows:
            header = ["ratio", "found", "at most", "met", "of their matrix products"]
            lines += ["", markdown_table(header, rows)]
    left_out = left_out_words(result["cases"])
    if left_out:
        lines += ["", "Left out:", "", *left_out]
    if figure is not None:
        lines += ["", f"![Where a training step's time goes]({figure})"]
    noise = result["noise"]
    if noise["noisy"]:
        lines += ["", f"**Noisy**: {'; '.join(noise['why'])}."]
    return lines


def _by_products(found: Result, providers: dict[str, Result]) -> str:
    """The same ratio of what was counted, which does not scatter."""
    for what, slower, faster, _ in BARS:
        if what == found["what"] and "flops" in providers[slower]:
            return f"{providers[slower]['flops'] / providers[faster]['flops']:.2f}"
    return "-"


def _met(found: Result) -> str:
    return "yes" if found["met"] else "**no**"
