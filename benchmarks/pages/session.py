"""Sections of the performance page for a session on a GPU."""

from ...engine.runtime.text import markdown_table
from ..measuring.environment import Result
from ..measuring.times_table import times_table
from .cases import noise_lines


def session_section(result: Result) -> list[str]:
    """The parts of the session, also those that were cut off or not started."""
    rows = [
        [part["title"], part["status"], f"{part['seconds']:.0f} s", part["why"] or "-"]
        for part in result["parts"]
    ]
    return [
        "### The session on the GPU",
        "",
        "`make gpu`: parts in this order, each with a time box. A part that was cut off keeps the "
        "cases that it had finished.",
        "",
        markdown_table(["part", "status", "took", "why"], rows),
    ]


def steps_section(result: Result) -> list[str]:
    """Training steps with and without the gate."""
    lines = ["### A training step on the GPU", "", "The trainers took turns of several steps."]
    for case in result["cases"]:
        lines += ["", f"{case['words']}:", "", times_table(case["providers"])]
    return [*lines, *noise_lines(result)]
