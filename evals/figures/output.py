"""A figure as the bytes of a PNG file, and as an SVG element that takes a page's colours."""

import io
import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from hipp_ext.evals.figures.style import PAGE_COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMES = re.compile(r"^\{[^}]*\}")  # what ElementTree writes in front of a name for its namespace
_USED = re.compile(r"(?<=#)[\w-]+")


def png(figure: "Figure", dpi: int = 240) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def svg(figure: "Figure", name: str = "figure") -> str:
    """The figure as an SVG element for an HTML page.

    Its text takes the page's font. Every colour of `style` becomes one of the page: `currentColor`,
    or a CSS variable (`--line`, `--card`, `--model-0` and so on). Matplotlib escapes every text in
    it.

    Args:
        figure: the figure, drawn in `style.drawing`.
        name: begins the ids of the element, because a page has one namespace of ids for all of its
            figures.
    """
    import matplotlib as mpl

    buffer = io.BytesIO()
    absent = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hipp-ext"}):
        figure.savefig(buffer, format="svg", metadata=absent)
    root = ElementTree.fromstring(buffer.getvalue())
    _simplify(root, name)
    return ElementTree.tostring(root, encoding="unicode")


def _simplify(root: ElementTree.Element, name: str) -> None:
    """Leave what an HTML page needs, with its colours, and with ids of its own."""
    for parent in list(root.iter()):
        for child in list(parent):
            if _NAMES.sub("", child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = _NAMES.sub("", element.tag)
        element.attrib = {_NAMES.sub("", key): value for key, value in element.attrib.items()}
    values = " ".join(value for element in root.iter() for value in element.attrib.values())
    used = set(_USED.findall(values))
    for element in root.iter():
        if element.get("id", "") not in used:
            element.attrib.pop("id", None)
        for key, value in element.attrib.items():
            element.set(key, _for_page(key, value, name))
    for size in ("width", "height"):  # the page's style says how wide it is
        root.attrib.pop(size, None)


def _for_page(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key in ("href", "clip-path") or "url(#" in value:
        return value.replace("#", f"#{name}-")
    if key == "style":
        for colour, page_colour in PAGE_COLOURS.items():
            value = value.replace(colour, page_colour)
    return value
