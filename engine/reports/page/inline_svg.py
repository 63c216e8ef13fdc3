"""An SVG file as a part of an HTML page: names of its own, nothing that runs or loads."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

_SVG = "{http://www.w3.org/2000/svg}"
# Style sheets reach beyond their picture once it is part of a page; the rest runs or loads.
_DROPPED = ("script", "style", "metadata", "foreignObject", "title", "desc", "a", "set")
_PAINT = re.compile(r"\b(fill|stroke|stop-color)(\s*:\s*)(#[0-9a-fA-F]{3,6}|black|white)\b")
# What ink and paper are is up to the page, which may be dark.
_THEMED = {
    **dict.fromkeys(("#000000", "#000", "black"), "currentColor"),
    **dict.fromkeys(("#ffffff", "#fff", "white"), "var(--card)"),
}
_PIXELS_A_POINT = 4 / 3
_SMALLEST = 0.6
_MARKED = re.compile(r"(series|legend)-(\d+)(-\w+)?")


def inline_svg(file: Path, prefix: str, description: str) -> str:
    """The picture as an `<svg>` element as wide as its place, in the page's ink and paper.

    Args:
        prefix: put before every id, so that pictures of one page do not share any.
        description: what a screen reader says.

    Elements with the ids series-N or legend-N, also with -more behind, are marked with data-series
    and data-legend.

    Raises:
        ValueError: the file is missing, is no SVG, or loads something from elsewhere.
    """
    try:
        root = ElementTree.parse(file).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise ValueError(f"{str(file)!r} is not an SVG picture: {error}") from None
    if root.tag != f"{_SVG}svg":
        raise ValueError(f"{str(file)!r} is not an SVG picture: its root is {root.tag!r}.")
    _clean(root, file, prefix)
    box = root.get("viewBox") or _box(root, file)
    root.attrib.clear()
    root.attrib |= {"viewBox": box, "role": "img", "aria-label": description}
    # Never larger than drawn, so that letters have one size in all pictures; never so small that
    # they cannot be read.
    width = float(box.split()[2]) * _PIXELS_A_POINT
    root.set("style", f"width: {width:.0f}px; min-width: {_SMALLEST * width:.0f}px")
    root.set("fill", "currentColor")
    root.tail = None
    return ElementTree.tostring(root, encoding="unicode")


def _box(root: ElementTree.Element, file: Path) -> str:
    sizes = [re.match(r"\s*([\d.]+)", root.get(name, "")) for name in ("width", "height")]
    if None in sizes:
        raise ValueError(f"{str(file)!r} has neither a viewBox nor a width and a height.")
    return " ".join(["0 0", *(size[1] for size in sizes if size)])


def _clean(element: ElementTree.Element, file: Path, prefix: str) -> None:
    for child in list(element):
        # Comments have a function as their tag; editors' elements are in namespaces of their own.
        name = child.tag if isinstance(child.tag, str) else ""
        if not name.startswith(_SVG) or name.removeprefix(_SVG) in _DROPPED:
            element.remove(child)
        else:
            _clean(child, file, prefix)
    element.tag = element.tag.removeprefix(_SVG)
    attributes = dict(element.attrib)
    element.attrib.clear()
    for qualified, value in attributes.items():
        name = qualified.rpartition("}")[2]
        if name.startswith("on") or (name != "href" and qualified.startswith("{")):
            continue
        if name == "id":
            marked = _MARKED.fullmatch(value)
            if marked:
                element.set(f"data-{marked[1]}", marked[2])
            value = prefix + value
        elif name == "href":
            if not value.startswith(("#", "data:image/")):
                raise ValueError(f"{str(file)!r} loads {value!r}: a page must stand alone.")
            value = f"#{prefix}{value[1:]}" if value.startswith("#") else value
        else:
            if re.search(r"url\(\s*['\"]?[^#'\"\s]", value):
                raise ValueError(f"{str(file)!r} loads {value!r}: a page must stand alone.")
            value = re.sub(r"url\(\s*(['\"]?)#", rf"url(\1#{prefix}", value)
        if name == "style":
            value = _PAINT.sub(lambda m: m[1] + m[2] + _THEMED.get(m[3].lower(), m[3]), value)
        elif name in ("fill", "stroke"):
            value = _THEMED.get(value.lower(), value)
        element.set(name, value)
