"""Table of times by provider, for the terminal and for the pages."""

from collections.abc import Callable, Mapping, Sequence

from ...engine.runtime.text import markdown_table
from .environment import Result

Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]


def times_table(
    providers: Mapping[str, Result],
    table: Table = markdown_table,
    names: Mapping[str, str] | None = None,
) -> str:
    """Medians and percentiles, also relative to the first provider, floors, memory and errors.

    Columns that no provider has are left out. names: words for the providers in the first column.
    """
    if not providers:
        return "Nothing was measured."
    first = next(iter(providers.values()))["p50_ms"]

    def numbers(key: str, words: str, unit: float = 1) -> list[str]:
        values = (entry.get(key) for entry in providers.values())
        return ["-" if value is None else words.format(value / unit) for value in values]

    columns = {
        "provider": [(names or {}).get(name, name) for name in providers],
        "median (20th to 80th percentile), ms": [
            f"{short(entry['p50_ms'])} ({short(entry['p20_ms'])} to {short(entry['p80_ms'])})"
            for entry in providers.values()
        ],
        "time relative to the first": [
            "-" if entry["p50_ms"] == first else f"{entry['p50_ms'] / first:.2f}"
            for entry in providers.values()
        ],
        "slower beside a busy core (90th percentile)": [
            f"{busy['slowdown']:.2f} ({busy['p90_slowdown']:.2f})" if busy else "-"
            for busy in (entry.get("busy_core") for entry in providers.values())
        ],
        "time over floor": numbers("over_floor", "{:.2f}"),
        "sent, MB": numbers("sent_bytes", "{:.2f}", 1e6),
        "loopback, MB": numbers("loopback_bytes", "{:.2f}", 1e6),
        "peak memory, MiB": numbers("peak_bytes", "{:.1f}", 2**20),
        "error": numbers("error", "{:.0e}"),
    }
    shown = {name: cells for name, cells in columns.items() if set(cells) != {"-"}}
    return table(list(shown), list(zip(*shown.values(), strict=True)))


def short(milliseconds: float) -> str:
    """Three significant digits without an exponent."""
    if milliseconds >= 100:
        return f"{milliseconds:.0f}"
    return f"{milliseconds:.{1 if milliseconds >= 10 else 2 if milliseconds >= 1 else 3}f}"
