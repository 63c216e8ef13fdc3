"""Tables as text, Markdown and CSV; suggestions for misspelled names."""

from __future__ import annotations

import csv
import difflib
import io
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from .files import write_whole


def nearest_directory(name_or_path: str) -> str:
    """Return ' Did you mean …?' if a directory of a similar name exists beside, else ''."""
    path = Path(name_or_path)
    if not path.parent.is_dir() or path.is_dir():
        return ""
    names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    nearest = difflib.get_close_matches(path.name, names, n=1)
    return f" Did you mean {str(path.parent / nearest[0])!r}?" if nearest else ""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ' Did you mean …?' with the nearest known name, or the list of known names."""
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if nearest:
        return f" Did you mean {nearest[0]!r}?"
    return f" Known: {', '.join(names)}."


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table of padded columns; the first is left-aligned, the others right-aligned."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        first, *others = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join([first, *others]).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table in GitHub's Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_tables(
    path: Path,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    words: str = "",
    numbers: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None,
) -> list[Path]:
    """Write a table to `path`.csv and, below `words`, to `path`.md; return both files.

    `numbers`: header and rows of the CSV if they differ from those of the Markdown.
    """
    text = io.StringIO()
    of_csv = (header, rows) if numbers is None else numbers
    csv.writer(text, lineterminator="\n").writerows([of_csv[0], *of_csv[1]])
    files = [path.with_name(path.name + suffix) for suffix in (".csv", ".md")]
    write_whole(files[0], text.getvalue())
    intro = f"{words}\n\n" if words else ""
    write_whole(files[1], f"{intro}{markdown_table(header, rows)}\n")
    return files


def leader(scores: dict[str, list[float]]) -> str | None:
    """Return the name with the best mean score if its lead is clear, else None.

    scores: name -> score per seed. A lead is clear if it exceeds the sum of the standard deviations
    of the best two; every name needs at least two seeds.
    """
    order = sorted(scores, key=lambda objective: -statistics.mean(scores[objective]))
    if len(order) < 2 or min(len(values) for values in scores.values()) < 2:
        return None
    first, second = scores[order[0]], scores[order[1]]
    lead = statistics.mean(first) - statistics.mean(second)
    return order[0] if lead > statistics.stdev(first) + statistics.stdev(second) else None
