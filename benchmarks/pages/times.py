"""Sections of the performance page for suites with one table of times and their targets."""

from ..measuring.environment import Result
from ..measuring.times_table import times_table
from ..suites.loops.suite import WORDS as LOOPS
from ..suites.suite import describe
from ..suites.wider.suite import WORDS as LOSSES


def loops_section(result: Result) -> list[str]:
    shape = result["shape"]
    return [
        "### The gate in loops of several processes",
        "",
        f"{result['ranks']} gloo ranks on this machine with {result['threads']} thread(s) each, "
        f"MiniLM in float32, {shape['batch']} texts of {shape['tokens']} tokens a rank. Each list "
        "of gradients is sent once a step.",
        "",
        times_table(result["times"], names=LOOPS),
        "",
        *(f"- {describe(bar)}" for bar in result["bars"]),
    ]


def wider_section(result: Result) -> list[str]:
    shape = result["shape"]
    return [
        "### Learned temperatures, several labels, a memory",
        "",
        f"`supcon_loss`, forward + backward, float32, {result['threads']} thread(s): "
        f"{shape['rows']} rows of width {shape['width']} in {shape['classes']} classes; for the "
        f"memory {shape['samples']} samples and {shape['memory']} rows.",
        "",
        times_table(result["times"], names=LOSSES),
        "",
        *(f"- {describe(bar)}" for bar in result["bars"]),
    ]
