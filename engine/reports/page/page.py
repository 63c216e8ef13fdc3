"""A self-contained HTML page of figures and tables: it loads nothing, and is light or dark."""

from __future__ import annotations

import base64
import html
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ...runtime.files import write_whole
from ...runtime.text import write_tables
from .inline_svg import inline_svg

CAPTION_SUFFIX = ".caption.txt"
_NUMBER = re.compile(r"(\*\*)?[+-]?\d[\d.,]*\s?(%|x|s|°)?(\s|\*|$|±|\()")


@dataclass(frozen=True)
class Figure:
    """A picture (.svg or .png) with its caption.

    description: text for screen readers; empty: the caption.
    """

    path: Path
    caption: str = ""
    description: str = ""


@dataclass(frozen=True)
class Table:
    """Cells as text, with `**strong**` ones marked so; the first column names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it, in this order.

    text: paragraphs separated by blank lines, with `code` and **strong** marked so.
    notes: limits of the numbers; commands: command lines that repeat the runs.
    files: further files, linked if they lie beside the page or below it.
    """

    title: str
    text: str = ""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    commands: Sequence[str] = ()
    files: Sequence[Path] = ()


def write_section(
    path: Path,
    title: str,
    table: Table,
    figures: Sequence[Path],
    caption: str,
    notes: Sequence[str],
    numbers: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None,
    text: str = "",
) -> Section:
    """Write a table as `path`.csv and .md; returns the section with it and a figure.

    figures: files of one figure, of which the section shows the SVG, with `caption`.
    numbers: header and rows of the CSV file, if they are not those of the table.
    """
    words = "\n\n".join([table.caption, *notes])
    files = [*figures, *write_tables(path, table.header, table.rows, words, numbers)]
    described = f"{caption} The numbers are in the table below."
    shown = [Figure(file, caption, described) for file in figures if file.suffix == ".svg"]
    return Section(title, text, shown, [table], notes, files=files)


def write_analysis(
    output_dir: Path, title: str, findings: Sequence[str], section: Section
) -> list[Path]:
    """Write index.html with a single section, and a <name>.caption.txt beside each figure.

    Returns the files of the section, and the page.
    """
    for figure in section.figures:
        beside = figure.path.with_name(f"{figure.path.stem}{CAPTION_SUFFIX}")
        write_whole(beside, figure.caption + "\n")
    return [*section.files, write_page(output_dir / "index.html", title, findings, [section])]


def write_page(
    path: Path,
    title: str,
    findings: Sequence[str],
    sections: Sequence[Section],
    facts: Mapping[str, str] | None = None,
) -> Path:
    """Write the page; returns `path`.

    Args:
        findings: a sentence each.
        facts: data, model, versions, …: name -> value.

    Raises:
        ValueError: a picture is missing or loads something, or a row has too few or many cells.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["marked"] = _marked
    text = environment.get_template("page.html").render(
        title=title,
        findings=findings,
        picture=_picture,
        column_classes=_column_classes,
        facts=facts or {},
        sections=list(zip(_anchors(section.title for section in sections), sections, strict=True)),
        directory=path.parent,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text + "\n")
    return path


def captioned_figures(directories: Iterable[Path]) -> list[Figure]:
    """The pictures with a <name>.caption.txt beside them, by name; .svg rather than .png."""
    found = []
    for directory in dict.fromkeys(directories):
        for file in sorted(directory.glob(f"*{CAPTION_SUFFIX}")):
            name = str(file).removesuffix(CAPTION_SUFFIX)
            pictures = [Path(name + suffix) for suffix in (".svg", ".png")]
            caption = file.read_text(encoding="utf-8").strip()
            found += [Figure(path, caption) for path in pictures if path.is_file()][:1]
    return found


def _anchors(titles: Iterable[str]) -> list[str]:
    """A distinct anchor for each title."""
    taken: list[str] = []
    for title in titles:
        base = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
        numbered = (f"{base}-{number}" for number in itertools.count(2))
        names = itertools.chain([base], numbered)
        taken.append(next(name for name in names if name not in taken))
    return taken


def _marked(text: str) -> Markup:
    """Text as HTML, with `code` and **strong**."""
    escaped = html.escape(text)
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped)
    return Markup(re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", escaped))


def _picture(figure: Figure, prefix: str) -> Markup:
    """The picture as an element; `prefix`: of the ids in an SVG picture."""
    words = figure.description or figure.caption or figure.path.stem.replace("_", " ")
    if figure.path.suffix != ".png":
        return Markup(inline_svg(figure.path, prefix, words))
    if not figure.path.is_file():
        raise ValueError(f"{str(figure.path)!r} does not exist.")
    content = base64.b64encode(figure.path.read_bytes()).decode("ascii")
    return Markup('<img src="data:image/png;base64,{}" alt="{}">').format(content, words)


def _column_classes(table: Table) -> list[Markup]:
    """The class attribute of each column's cells: that of numbers, or none."""
    for row in table.rows:
        if len(row) != len(table.header):
            raise ValueError(
                f"table {table.caption or list(table.header)!r}: a row has {len(row)} cells and "
                f"the header {len(table.header)}: {list(row)}."
            )
    classes = []
    for place in range(len(table.header)):
        cells = [row[place] for row in table.rows if row[place]]
        is_numeric = place > 0 and cells and all(map(_NUMBER.match, cells))
        classes.append(Markup(' class="number"' if is_numeric else ""))
    return classes
