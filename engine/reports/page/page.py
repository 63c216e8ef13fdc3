"""One HTML page of figures and tables that stands alone: no request, light and dark, any width."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...runtime.files import write_whole
from .inline_svg import inline_svg
from .page_style import SCRIPT, STYLE

CAPTION_SUFFIX = ".caption.txt"
# More than this is folded away.
_SHOWN_COMMANDS = 3
_NUMBER = re.compile(r"(\*\*)?[+-]?\d[\d.,]*\s?(%|x|s|°)?(\s|\*|$|±|\()")
# The browser itself then refuses whatever would be loaded from elsewhere.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Figure:
    """A picture (.svg, or .png where there is none), its caption, and words in its place."""

    path: Path
    caption: str = ""
    # For those who do not see it; empty: the caption.
    description: str = ""


@dataclass(frozen=True)
class Table:
    """Cells as text; `**so**` is strong. The first column names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A heading and what is under it, in this order.

    text: paragraphs, a blank line between them; `code` and **strong** are marked so.
    figures: with a caption, or a path (its caption is then beside it in <name>.caption.txt).
    tables: with a caption, or header and rows.
    notes: what a reader must know to trust it; commands: lines to repeat it.
    files: what else there is, linked where it lies beside the page.
    """

    title: str
    text: str = ""
    figures: Sequence[Path | Figure] = ()
    tables: Sequence[Table | tuple[Sequence[str], Sequence[Sequence[str]]]] = ()
    notes: Sequence[str] = ()
    commands: Sequence[str] = ()
    files: Sequence[Path] = ()


def write_page(
    path: Path,
    title: str,
    summary: str | Sequence[str],
    sections: Sequence[Section],
    facts: Mapping[str, str] | None = None,
) -> Path:
    """Write the page; returns `path`.

    Args:
        summary: what was found, a sentence or several.
        facts: what was run, name -> value.

    Raises:
        ValueError: a picture is missing or loads something, or a table's row is too long or short.
    """
    names = _names(section.title for section in sections)
    contents = [
        f'<li><a href="#{name}">{_marked(section.title)}</a></li>'
        for name, section in zip(names, sections, strict=True)
    ]
    body = [
        _section(section, name, path.parent) for name, section in zip(names, sections, strict=True)
    ]
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        f"<title>{html.escape(title)}</title>",
        f"<style>{STYLE}</style>",
        "</head>",
        "<body>",
        '<div class="layout">',
        "<header>",
        f"<h1>{_marked(title)}</h1>",
        _findings(summary),
        _facts(facts or {}),
        "</header>",
        f'<nav aria-label="Contents"><div><h2>Contents</h2><ol>{"".join(contents)}</ol></div></nav>'
        if contents
        else "",
        "<main>",
        *body,
        "</main>",
        "<footer>Written by fusedacl. The page loads nothing; the files that it names lie beside "
        "it.</footer>",
        "</div>",
        f"<script>{SCRIPT}</script>",
        "</body>",
        "</html>",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "\n".join(part for part in parts if part) + "\n")
    return path


def captioned_figures(directories: Iterable[Path]) -> list[Figure]:
    """The pictures with a <name>.caption.txt beside them, by name; .svg rather than .png."""
    found = []
    for directory in dict.fromkeys(directories):
        for sidecar in sorted(directory.glob(f"*{CAPTION_SUFFIX}")):
            stem = sidecar.name.removesuffix(CAPTION_SUFFIX)
            pictures = (directory / f"{stem}{suffix}" for suffix in (".svg", ".png"))
            picture = next((file for file in pictures if file.is_file()), None)
            if picture is not None:
                found.append(Figure(picture, _caption_of(picture)))
    return found


def _caption_of(picture: Path) -> str:
    sidecar = picture.with_name(picture.stem + CAPTION_SUFFIX)
    return sidecar.read_text(encoding="utf-8").strip() if sidecar.is_file() else ""


def _names(titles: Iterable[str]) -> list[str]:
    """An anchor for each title, no two alike."""
    taken: list[str] = []
    for title in titles:
        base = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
        name, number = base, 1
        while name in taken:
            number += 1
            name = f"{base}-{number}"
        taken.append(name)
    return taken


def _marked(text: str) -> str:
    """Text as HTML, with `code` and **strong**."""
    escaped = html.escape(text)
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped)
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", escaped)


def _findings(summary: str | Sequence[str]) -> str:
    sentences = [summary] if isinstance(summary, str) else list(summary)
    sentences = [sentence for sentence in sentences if sentence]
    if not sentences:
        return ""
    if len(sentences) == 1:
        inner = f"<p>{_marked(sentences[0])}</p>"
    else:
        inner = "<ul>" + "".join(f"<li>{_marked(line)}</li>" for line in sentences) + "</ul>"
    return f'<div class="findings">{inner}</div>'


def _facts(facts: Mapping[str, str]) -> str:
    if not facts:
        return ""
    lines = [f"<dt>{_marked(name)}</dt><dd>{_marked(value)}</dd>" for name, value in facts.items()]
    return f'<dl class="facts">{"".join(lines)}</dl>'


def _section(section: Section, name: str, directory: Path) -> str:
    parts = [f'<section id="{name}" aria-labelledby="{name}-title">']
    parts.append(f'<h2 id="{name}-title">{_marked(section.title)}</h2>')
    parts += [f"<p>{_marked(p)}</p>" for p in section.text.split("\n\n") if p.strip()]
    for index, figure in enumerate(section.figures):
        parts.append(_figure(figure, f"{name}-figure-{index}-"))
    for index, table in enumerate(section.tables):
        made = table if isinstance(table, Table) else Table(*table)
        parts.append(_table(made, f"{name}-table-{index}", section.title))
    if section.notes:
        notes = "".join(f"<li>{_marked(note)}</li>" for note in section.notes)
        parts.append(f'<ul class="notes">{notes}</ul>')
    if section.commands:
        lines = "".join(f"<pre><code>{html.escape(c)}</code></pre>" for c in section.commands)
        if len(section.commands) > _SHOWN_COMMANDS:
            summary = f"{len(section.commands)} commands"
            lines = f"<details><summary>{summary}</summary>{lines}</details>"
        parts.append(lines)
    if section.files:
        parts.append(_files(section.files, directory))
    return "\n".join([*parts, "</section>"])


def _figure(figure: Path | Figure, prefix: str) -> str:
    if isinstance(figure, Path):
        figure = Figure(figure, _caption_of(figure))
    words = figure.description or figure.caption or figure.path.stem.replace("_", " ")
    if figure.path.suffix == ".png":
        if not figure.path.is_file():
            raise ValueError(f"{str(figure.path)!r} does not exist.")
        content = base64.b64encode(figure.path.read_bytes()).decode("ascii")
        picture = f'<img src="data:image/png;base64,{content}" alt="{html.escape(words)}">'
    else:
        picture = inline_svg(figure.path, prefix, words)
    caption = f"<figcaption>{_marked(figure.caption)}</figcaption>" if figure.caption else ""
    # Focusable, so that the keyboard scrolls it where it is wider than the window.
    return (
        f'<figure><div class="chart card scroll" tabindex="0" role="group" '
        f'aria-label="Figure">{picture}</div>{caption}</figure>'
    )


def _table(table: Table, name: str, title: str) -> str:
    for row in table.rows:
        if len(row) != len(table.header):
            raise ValueError(
                f"table {table.caption or title!r}: a row has {len(row)} cells and the header "
                f"{len(table.header)}: {list(row)}."
            )
    numeric = [
        column > 0
        and any(row[column] for row in table.rows)
        and all(_NUMBER.match(row[column]) for row in table.rows if row[column])
        for column in range(len(table.header))
    ]
    classes = [' class="number"' if number else "" for number in numeric]
    head = "".join(
        f'<th scope="col"{kind}><button type="button">{_marked(cell)}</button></th>'
        for cell, kind in zip(table.header, classes, strict=True)
    )
    lines = []
    for row in table.rows:
        cells = [f'<th scope="row">{_marked(row[0])}</th>'] if row else []
        for cell, kind in zip(row[1:], classes[1:], strict=True):
            cells.append(f"<td{kind}>{_marked(cell)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    caption = f'<figcaption id="{name}">{_marked(table.caption)}</figcaption>'
    label = f'aria-labelledby="{name}"' if table.caption else f'aria-label="{html.escape(title)}"'
    return (
        f"<figure>{caption if table.caption else ''}"
        f'<div class="card scroll" role="region" tabindex="0" {label}>'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
        "</div></figure>"
    )


def _files(files: Sequence[Path], directory: Path) -> str:
    links = []
    for file in files:
        if file.is_relative_to(directory):
            place = html.escape(file.relative_to(directory).as_posix())
            links.append(f'<a href="{place}">{html.escape(file.name)}</a>')
        else:
            links.append(html.escape(file.name))
    return f'<p class="files">Files: {", ".join(links)}</p>'
