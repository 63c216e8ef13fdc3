"""The page is well-formed, loads nothing, has unique ids, and shows its contents."""

from __future__ import annotations

from pathlib import Path

import pytest
from fusedacl.engine.reports.page.inline_svg import inline_svg
from fusedacl.engine.reports.page.page import Figure, Section, Table, captioned_figures, write_page
from page_checks import check_page

SVG = (
    '<?xml version="1.0"?><!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" '
    '"http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd">'
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'width="72pt" height="36pt"{root}><metadata>made by</metadata><defs>'
    '<style>* {{ fill: red }}</style><path id="m" d="M 0 0"/></defs>'
    '<g id="series-2-1" clip-path="url(#m)"><use xlink:href="#m" '
    'style="stroke: #000000; fill: #ffffff"/></g><g id="legend-2"><text>a</text></g>{more}</svg>'
)


def write_svg(path: Path, root: str = "", more: str = "") -> Path:
    path.write_text(SVG.format(root=root, more=more))
    return path


def test_a_page_of_everything(tmp_path: Path) -> None:
    picture = write_svg(tmp_path / "a.svg")
    (tmp_path / "a.caption.txt").write_text("Beside <it>\n")
    beside = captioned_figures([tmp_path])
    (tmp_path / "b.png").write_bytes(b"\x89PNG")
    table = Table(["method", "score"], [["A & B", "**65.0 ± 7.1**"], ["`C`", "3"]], "All of them")
    sections = [
        Section("Same", "One.\n\nTwo.", [*beside, Figure(picture, "again")], [table], ["a note"]),
        Section("Same", tables=[Table(["x", "y"], [["1", "no number"]])], files=[picture]),
        Section("Last", figures=[Figure(tmp_path / "b.png", "png")], commands=["run <me>"] * 4),
    ]
    path = tmp_path / "new" / "index.html"
    assert write_page(path, "A <title>", ["First.", "Second."], sections, {"Data": "mrpc"}) == path
    checker = check_page(path)
    text = path.read_text()
    assert {"same", "same-2", "last"} <= set(checker.ids)
    for words in (
        "<title>A &lt;title&gt;</title>", "<li>First.</li>", "<dt>Data</dt><dd>mrpc</dd>",
        "<p>One.</p>", "<p>Two.</p>", "Beside &lt;it&gt;", '<th scope="row">A &amp; B</th>',
        '<td class="number"><strong>65.0 ± 7.1</strong></td>', "<td>no number</td>",
        '<th scope="row"><code>C</code></th>', "<li>a note</li>", "<summary>4 commands</summary>",
        "run &lt;me&gt;", 'alt="png"', "data:image/png;base64,",
    ):  # fmt: skip
        assert words in text, words
    assert text.count("<svg ") == 2
    one = write_page(tmp_path / "one.html", "One", ["A sentence."], [])
    assert "<p>A sentence.</p>" in one.read_text() and "<nav" not in one.read_text()
    check_page(one)


def test_rows_that_do_not_fit(tmp_path: Path) -> None:
    section = Section("Scores", tables=[Table(["a", "b"], [["only one"]], "All")])
    with pytest.raises(ValueError, match="'All': a row has 1 cells and the header 2"):
        write_page(tmp_path / "x.html", "x", [], [section])
    assert not (tmp_path / "x.html").exists()


def test_pictures_lose_what_runs_and_keep_their_names_apart(tmp_path: Path) -> None:
    active = '<script>alert(1)</script><foreignObject/><a xlink:href="http://x"><path d="M"/></a>'
    path = write_svg(tmp_path / "a.svg", ' onload="alert(1)"', active)
    text = inline_svg(path, "p-", 'it "is"')
    for gone in ("script", "alert", "foreignObject", "http", "metadata", "made by", "<style"):
        assert gone not in text
    assert 'viewBox="0 0 72 36"' in text
    assert 'aria-label="it &quot;is&quot;"' in text and 'role="img"' in text
    assert 'id="p-m"' in text and 'href="#p-m"' in text and "url(#p-m)" in text
    assert "stroke: currentColor; fill: var(--card)" in text
    assert '<g data-series="2" id="p-series-2-1"' in text
    assert '<g data-legend="2" id="p-legend-2"' in text


@pytest.mark.parametrize(
    "more",
    [
        '<image href="http://x/y.png"/>',
        '<image xlink:href="//x/y.png"/>',
        '<rect fill="url(http://x)"/>',
        '<rect style="fill: url( &quot;http://x)"/>',
    ],
)
def test_pictures_that_load_something(more: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a.svg' loads .*must stand alone"):
        inline_svg(write_svg(tmp_path / "a.svg", more=more), "", "")


def test_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "text.svg").write_text("text")
    (tmp_path / "html.svg").write_text("<html/>")
    (tmp_path / "size.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    no_svg, no_size = "is not an SVG picture", "neither a viewBox nor a width"
    messages = {"text": no_svg, "html": "its root is 'html'", "size": no_size, "absent": no_svg}
    for name, words in messages.items():
        with pytest.raises(ValueError, match=words):
            inline_svg(tmp_path / f"{name}.svg", "", "")
    with pytest.raises(ValueError, match="absent.png' does not exist"):
        figure = Figure(tmp_path / "absent.png")
        write_page(tmp_path / "x.html", "x", [], [Section("s", figures=[figure])])


def test_captions_beside_pictures(tmp_path: Path) -> None:
    for name in ("b.svg", "b.png", "a.png", "without.svg"):
        (tmp_path / name).write_text("")
    for name in ("a", "b", "gone"):
        (tmp_path / f"{name}.caption.txt").write_text(f" {name}: words\n")
    found = captioned_figures([tmp_path, tmp_path, tmp_path / "absent"])
    shown = {figure.path.name: figure.caption for figure in found}
    assert shown == {"a.png": "a: words", "b.svg": "b: words"} and len(found) == 2
