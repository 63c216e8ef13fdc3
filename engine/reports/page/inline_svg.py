"""SVG files inside an HTML page: ids are made unique, active and external content is removed."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

_SVG = "{http://www.w3.org/2000/svg}"
# Style sheets would apply to the whole page; the other elements run or load something.
_DROPPED = ("script", "style", "metadata", "foreignObject", "title", "desc", "a", "set")
_PAINT = re.compile(r"\b(fill|stroke|stop-color)(\s*:\s*)(#[0-9a-fA-F]{3,6}|black|white)\b")
# Black and white become the page's text and background colours, for its dark theme.
_THEMED = {
    **dict.fromkeys(("#000000", "#000", "black"), "currentColor"),
    **dict.fromkeys(("#ffffff", "#fff", "white"), "var(--card)"),
}
_PIXELS_PER_POINT = 4 / 3
_MIN_SCALE = 0.6
_MARKED = re.compile(r"(series|legend)-(\d+)(-\w+)?")


def inline_svg(file: Path, prefix: str, description: str) -> str:
    """The picture as an `<svg>` element that follows the page's width and theme.

    Args:
        prefix: prefix of all ids, so that pictures on a page share none.
        description: text for screen readers.

    Elements with ids series-N, series-N-… and legend-N, legend-N-… get the attributes data-series
    and data-legend.

    Raises:
        ValueError: the file is missing, is not an SVG picture, or loads something.
    """
    try:
        root = ElementTree.parse(file).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise ValueError(f"{str(file)!r} is not an SVG picture: {error}") from None
    if root.tag != f"{_SVG}svg":
        raise ValueError(f"{str(file)!r} is not an SVG picture: its root is {root.tag!r}.")
    _clean(root, file, prefix)
    box = root.get("viewBox")
    if not box:
        sizes = [re.match(r"\s*([\d.]+)", root.get(name, "")) for name in ("width", "height")]
        box = " ".join(["0 0", *(size[1] for size in sizes if size)])
        if None in sizes:
            raise ValueError(f"{str(file)!r} has neither a viewBox nor a width and a height.")
    root.attrib.clear()
    root.attrib |= {"viewBox": box, "role": "img", "aria-label": description}
    # At most the size as drawn, so that text has the same size in all pictures, and large enough to
    # be read.
    width = float(box.split()[2]) * _PIXELS_PER_POINT
    root.set("style", f"width: {width:.0f}px; min-width: {_MIN_SCALE * width:.0f}px")
    root.set("fill", "currentColor")
    root.tail = None
    return ElementTree.tostring(root, encoding="unicode")


def _clean(element: ElementTree.Element, file: Path, prefix: str) -> None:
    """Remove active content, make ids unique and colours those of the page, in place."""
    for child in list(element):
        # The tag of a comment is a function; elements of editors are in other namespaces.
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
            if marked := _MARKED.fullmatch(value):
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
