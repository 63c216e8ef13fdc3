"""Tables as text, Markdown and CSV; suggestions for misspelled names."""

from __future__ import annotations

import csv
import difflib
import io
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
    return f" Did you mean {nearest[0]!r}?" if nearest else f" Known: {', '.join(names)}."


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table of padded columns; the first is left-aligned, the others right-aligned."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for first, *others in cells:
        padded = map(str.rjust, others, widths[1:])
        lines.append("  ".join([first.ljust(widths[0]), *padded]).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table in GitHub's Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def csv_text(rows: Iterable[Sequence[str]]) -> str:
    """Format rows as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


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
    names, values = (header, rows) if numbers is None else numbers
    files = [path.with_name(path.name + suffix) for suffix in (".csv", ".md")]
    write_whole(files[0], csv_text([names, *values]))
    intro = f"{words}\n\n" if words else ""
    write_whole(files[1], f"{intro}{markdown_table(header, rows)}\n")
    return files


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the error's type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
