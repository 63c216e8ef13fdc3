"""Sections of the performance page for the loss, the angle check and the growth."""

from collections.abc import Sequence

from ...engine.runtime.text import markdown_table
from ..measuring.environment import Result
from ..measuring.times_table import short, times_table
from ..suites import growth

TITLES = {
    "loss": "The contrastive loss, forward + backward",
    "angle": "The angle check and the gated combination",
}
BUSY_CORE = (
    "Beside a busy core: the same calls, one by one, while another process keeps a core busy; "
    "their median and 90th percentile over the median without it."
)
EXPLAINED = {
    "loss": "The loss and gradient of every provider were compared with float64 of its own formula "
    "before it was timed. Calls cycle through input sets that are larger than the cache together. "
    "The floor is computed from rates of matrix products and exponentials that were measured in "
    "turns with the providers.",
    "angle": "Two lists of gradients in the shapes of a BERT. The floor is the time to read them "
    "(and to write one) at the higher rate of copying and of a dot product, measured in turns with "
    "the providers. PCGrad is another rule; unscaling and clipping alone is the least that a "
    "float16 step does.",
}


def cases_section(result: Result) -> list[str]:
    """Every case with all providers, and the reasons of those that were left out."""
    benchmark = result["benchmark"]
    lines = [f"### {TITLES[benchmark]}", "", EXPLAINED[benchmark]]
    entries = [entry for case in result["cases"] for entry in case["providers"].values()]
    if any("busy_core" in entry for entry in entries):
        lines[-1] += f" {BUSY_CORE}"
    for case in result["cases"]:
        floor = ""
        if case.get("floor_ms") is not None:
            floor = f" (floor {short(case['floor_ms'])} ms, bound by {case['bound_by']})"
        lines += ["", f"{case['words']}{floor}:", "", times_table(case["providers"])]
    return [*lines, *left_out_lines(result["cases"]), *noise_lines(result)]


def growth_section(result: Result, figure: str) -> list[str]:
    """Exponents, and the largest size that fitted into memory, of every provider."""
    refused = [
        case
        for case in result["cases"]
        if any(reason.startswith("does not fit") for reason in case["left_out"].values())
    ]
    return [
        "### Growth of the cost",
        "",
        "An exponent is the least-squares slope between the logarithms of size and cost over the "
        f"upper half of the points (- : fewer than {growth.MIN_POINTS} points). The largest size "
        "is the last one that fitted into memory.",
        "",
        growth.fit_table(result["growth"], markdown_table),
        "",
        f"![Time and memory against size]({figure})",
        *left_out_lines(refused),
        *noise_lines(result),
    ]


def left_out_lines(cases: Sequence[Result]) -> list[str]:
    """One line per provider and reason, with the cases unless it is all of them."""
    where: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        for name, reason in case["left_out"].items():
            where.setdefault((name, reason), []).append(case["words"])
    lines = [
        f"- {name}: {reason}"
        + ("" if len(words) == len(cases) else f" ({', '.join(words)})")
        + ("" if reason.endswith(".") else ".")
        for (name, reason), words in where.items()
    ]
    return ["", "Left out:", "", *lines] if lines else []


def noise_lines(result: Result) -> list[str]:
    found = result["noise"]
    words = f"Typical spread of times (20th to 80th percentile): {found['spread']:.1%}."
    return ["", f"{words} **Noisy**: {'; '.join(found['why'])}." if found["noisy"] else words]
