"""Section of the performance page for the gate in loops of several processes."""

from ..measuring.environment import Result
from ..measuring.times_table import times_table
from ..suites.loops.suite import WORDS


def loops_section(result: Result) -> list[str]:
    shape = result["shape"]
    return [
        "### The gate in loops of several processes",
        "",
        f"{result['ranks']} gloo ranks on this machine with {result['threads']} thread(s) each, "
        f"MiniLM in float32, {shape['batch']} texts of {shape['tokens']} tokens a rank. Each list "
        "of gradients is sent once a step.",
        "",
        times_table(result["times"], names=WORDS),
        "",
        *(
            f"- {bar['what']}: {bar['value']:.2f} (target: at most {bar['at_most']})"
            for bar in result["bars"]
        ),
    ]
