"""An SVG of matplotlib -> an inline SVG for a page: its colours are the page's, light and dark."""

import re
from xml.etree import ElementTree

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_HREF = f"{{{_XLINK}}}href"
# How many runs or sides one chart can tell apart.
SERIES = 8
# Drawn in these colours, shown in the variables of page.css.
TEXT, GRID = "#010203", "#010204"
COLOURS = tuple(f"#0102{number:02x}" for number in range(0x10, 0x10 + SERIES))
_VARIABLES = {TEXT: "--muted", GRID: "--line"} | {
    colour: f"--series-{number}" for number, colour in enumerate(COLOURS)
}
_NUMBER = re.compile(r"-?\d+\.\d+")


def inline_svg(document: str, name: str, label: str) -> str:
    """Make an SVG document of matplotlib a part of a page.

    Args:
        document: what savefig wrote.
        name: begins every id, so that the charts of a page do not refer to each other's parts.
        label: what the chart shows, for screen readers.
    """
    root = ElementTree.fromstring(document)
    # The style sheet would hold for the whole page; page.css has its rule.
    for parent, tag in ((".", "metadata"), (f"{{{_SVG}}}defs", "style")):
        for found in root.findall(parent):
            for child in found.findall(f"{{{_SVG}}}{tag}"):
                found.remove(child)
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.attrib |= {"role": "img", "aria-label": label, "class": "chart"}
    parts = list(root.iter())
    used = {part.get(_HREF, "")[1:] for part in parts}
    used |= set(re.findall(r"url\(#([^)]+)\)", document))
    for part in parts:
        known = part.attrib.pop("id", None)
        if known in used:
            part.set("id", f"{name}-{known}")
        if _HREF in part.attrib:
            part.set("href", f"#{name}-{part.attrib.pop(_HREF)[1:]}")
        if "clip-path" in part.attrib:
            part.set("clip-path", part.attrib["clip-path"].replace("#", f"#{name}-"))
        if "style" in part.attrib:
            part.set("style", _themed(part.attrib["style"]))
        if "d" in part.attrib:
            part.set("d", _short(part.attrib["d"]))
        part.tag = part.tag.removeprefix(f"{{{_SVG}}}")
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _themed(style: str) -> str:
    """A style in the page's colours and font."""
    style = re.sub(r"font-family: [^;]*;? ?", "", style)
    return re.sub(r"#\w{6}", lambda found: _variable(found.group()), style)


def _variable(colour: str) -> str:
    return f"var({_VARIABLES[colour]})" if colour in _VARIABLES else colour


def _short(path: str) -> str:
    """A path with a tenth of a point, which is more than a screen shows."""
    path = _NUMBER.sub(lambda found: f"{float(found.group()):.1f}".removesuffix(".0"), path)
    return " ".join(path.split())
