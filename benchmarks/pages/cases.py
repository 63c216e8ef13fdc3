"""Sections of the performance page for results of cases: loss, angle, growth, step."""

from collections.abc import Sequence

from ...engine.runtime.text import markdown_table
from ..measuring.environment import Result
from ..suites import growth

TITLES = {
    "loss": "The contrastive loss, forward + backward",
    "angle": "The angle check and the gated combination",
    "step": "A training step",
}
EXPLAINED = {
    "loss": "Every provider's loss and gradient were checked against float64 of its own formula "
    "before it was timed. Inputs take turns, together larger than the cache. The floor is what the "
    "rates of matrix product and exponential, measured in the same rounds, allow for the symmetric "
    "sum over pairs.",
    "angle": "Gradients of a BERT, two lists. The floor is reading them (and writing one) at the "
    "rate of copying or of a dot product, whichever is faster, measured in the same rounds. "
    "PCGrad, and unscale and clip alone, do something else in the same place.",
    "step": "Providers took turns of several steps.",
}
HEADER = ["provider", "median (20th to 80th percentile), ms", "time relative to the first",
          "time over floor", "peak memory, MiB"]  # fmt: skip


def cases_section(result: Result) -> list[str]:
    """Every case with every provider, slower ones and faster ones; who was left out, and why."""
    benchmark = result["benchmark"]
    lines = [f"### {TITLES[benchmark]}", "", EXPLAINED[benchmark]]
    for case in result["cases"]:
        lines += ["", f"{case['words']}{_floor(case)}:", "", case_table(case)]
    left_out = left_out_words(result["cases"])
    if left_out:
        lines += ["", "Left out:", "", *left_out]
    return [*lines, *_noise(result)]


def growth_section(result: Result, figure: str | None) -> list[str]:
    """Exponents, and the largest size that each provider was given."""
    rows = []
    for fit in result["growth"]:
        slopes = ["-" if fit[key] is None else f"{fit[key]:.2f}" for key in ("time", "memory")]
        rows.append([fit["axis"], fit["provider"], *slopes, f"{fit['largest']:,}"])
    header = ["size", "provider", "exponent of time", "exponent of memory", "largest size"]
    lines = [
        "### How cost grows",
        "",
        "Exponents of the size, by least squares between logarithms over the upper half of the "
        f"points (- : fewer than {growth.MIN_POINTS} points). M: rows of one batch; d: their "
        "width; K: label embeddings; E: exits in one call; P: elements of each list of gradients. "
        "A provider's largest size is where it still fitted into memory.",
        "",
        markdown_table(header, rows),
    ]
    if figure is not None:
        lines += ["", f"![Time and memory against size]({figure})"]
    left_out = left_out_words(
        [case for case in result["cases"] if _refused(case["left_out"].values())]
    )
    if left_out:
        lines += ["", "Left out:", "", *left_out]
    return [*lines, *_noise(result)]


def case_table(case: Result) -> str:
    """Relative to the first provider, ours: above 1 takes longer, below 1 is faster."""
    providers = case["providers"]
    if not providers:
        return "Nothing was measured."
    first = next(iter(providers.values()))["p50_ms"]
    rows = []
    for name, entry in providers.items():
        over, peak = entry.get("over_floor"), entry.get("peak_bytes")
        rows.append(
            [
                name,
                f"{_short(entry['p50_ms'])} ({_short(entry['p20_ms'])} to "
                f"{_short(entry['p80_ms'])})",
                "-" if entry["p50_ms"] == first else f"{entry['p50_ms'] / first:.2f}",
                "-" if over is None else f"{over:.2f}",
                "-" if peak is None else f"{peak / 2**20:.1f}",
            ]
        )
    return markdown_table(HEADER, rows)


def _short(milliseconds: float) -> str:
    """Three digits, never as a power of ten."""
    if milliseconds >= 100:
        return f"{milliseconds:.0f}"
    return f"{milliseconds:.{1 if milliseconds >= 10 else 2 if milliseconds >= 1 else 3}f}"


def left_out_words(cases: Sequence[Result]) -> list[str]:
    """A line a provider and reason, with the cases where it is not all of them."""
    where: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        for name, reason in case["left_out"].items():
            where.setdefault((name, reason), []).append(case["words"])
    return [
        f"- {name}: {reason}"
        + ("" if len(words) == len(cases) else f" ({', '.join(words)})")
        + ("" if reason.endswith(".") else ".")
        for (name, reason), words in where.items()
    ]


def _refused(reasons: Sequence[str]) -> bool:
    return any(reason.startswith("does not fit") for reason in reasons)


def _floor(case: Result) -> str:
    if case.get("floor_ms") is None:
        return ""
    return f" (floor {_short(case['floor_ms'])} ms, bound by {case['bound_by']})"


def _noise(result: Result) -> list[str]:
    found = result["noise"]
    words = f"Times scatter by {found['spread']:.1%} (20th to 80th percentile, typical)."
    if found["noisy"]:
        words += f" **Noisy**: {'; '.join(found['why'])}."
    return ["", words]
