"""From a Matplotlib figure to SVG: as a file, and as a part of the page.

An artist's gid "KIND.Q" or "KIND.Q.K" becomes, on the page, class="KIND" data-q="Q" data-k="K": what the
page's script finds it by.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import matplotlib as mpl
from matplotlib.figure import Figure

from ..engines.naming import naming
from . import palette

_SVG: Final = "{http://www.w3.org/2000/svg}"
_HREF: Final = "{http://www.w3.org/1999/xlink}href"
_STYLE: Final = {
    "font.size": 9,
    "font.family": ["DejaVu Sans"],
    "axes.titlesize": 9.5,
    "axes.edgecolor": palette.MUTED,
    "axes.labelcolor": palette.INK,
    "axes.titlecolor": palette.INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "grid.color": palette.GRID,
    "grid.linewidth": 0.7,
    "text.color": palette.INK,
    "text.parse_math": False,  # a dollar sign in a file's name is a dollar sign
    "xtick.color": palette.MUTED,
    "ytick.color": palette.MUTED,
    "xtick.labelcolor": palette.INK,
    "ytick.labelcolor": palette.INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "hatch.color": palette.GRID,
    "hatch.linewidth": 0.6,
    "savefig.dpi": 160,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "sparsek",  # the same picture gives the same file
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.06,
}

ElementTree.register_namespace("", _SVG[1:-1])
ElementTree.register_namespace("xlink", _HREF[1:-5])


@dataclass(frozen=True)
class Picture:
    """A drawing and its words.

    Attributes:
        name: of its files, and unique on the page.
        alt: what it shows, for those who cannot see it.
        tips: a short text for an artist, by its gid: shown where the pointer rests on it.
        live: the page's script works on it; its tokens can be reached by keyboard.
        least_width: in CSS pixels; on a narrower screen it scrolls in a box of its own.
    """

    name: str
    title: str
    alt: str
    figure: Figure
    tips: dict[str, str] = field(default_factory=dict)
    live: bool = False
    least_width: int = 0


@contextmanager
def drawing() -> Iterator[None]:
    """The style of all pictures; they are both made and written in it."""
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a browser has more fonts
        warnings.filterwarnings(
            "ignore", message="Matplotlib currently does not support"
        )  # nor Arabic shapes
        yield


def new_figure(
    width: float, height: float, *, layout: Literal["constrained"] | None = "constrained"
) -> Figure:
    """An empty figure, in inches."""
    return Figure(figsize=(width, height), layout=layout)


def write_images(pictures: list[Picture], folder: Path) -> list[Path]:
    """Each as NAME.svg and NAME.png, on white. Returns the files. Raises OSError."""
    written = []
    with drawing():
        for picture in pictures:
            root = _tree(picture, palette.PAPER)
            for tag, text in (("desc", picture.alt), ("title", picture.title)):
                element = ElementTree.Element(f"{_SVG}{tag}")
                element.text = text
                root.insert(0, element)
            file, png = folder / f"{picture.name}.svg", folder / f"{picture.name}.png"
            with naming(file):
                file.write_bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))
            with naming(png):
                picture.figure.savefig(
                    png, format="png", facecolor=palette.PAPER, metadata={"Software": None}
                )
            written += [file, png]
    return written


def inline(picture: Picture) -> str:
    """The `<svg>` element of the page: its colours are the page's, its ids unique there."""
    with drawing():
        root = _tree(picture, "none")
    for element in list(root):
        if element.tag == f"{_SVG}metadata":
            root.remove(element)
    for defs in root.iter(f"{_SVG}defs"):
        for style in defs.findall(f"{_SVG}style"):  # it would be that of the whole page
            defs.remove(style)
    for element in root.iter():
        _adapt(element, picture)
    _, _, width, height = (float(x) for x in root.attrib["viewBox"].split())
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("style", f"aspect-ratio: {width:g} / {height:g}; --least: {picture.least_width}px")
    root.set("role", "group" if picture.live else "img")
    root.set("aria-label", f"{picture.title}. {picture.alt}")
    root.set("id", f"picture-{picture.name}")
    return ElementTree.tostring(root, encoding="unicode")


def _tree(picture: Picture, paper: str) -> ElementTree.Element:
    file = io.BytesIO()
    picture.figure.savefig(file, format="svg", facecolor=paper, metadata={"Date": None, "Creator": None})
    return ElementTree.fromstring(file.getvalue())


def _adapt(element: ElementTree.Element, picture: Picture) -> None:
    attributes = element.attrib
    gid = attributes.get("id", "")
    if "." in gid:
        kind, *numbers = gid.split(".")
        del attributes["id"]
        attributes["class"] = kind
        for name, number in zip(("data-q", "data-k"), numbers, strict=False):
            attributes[name] = number
        if gid in picture.tips:
            tip = ElementTree.Element(f"{_SVG}title")
            tip.text = picture.tips[gid]
            element.insert(0, tip)
        if picture.live and kind == "token":
            attributes |= {"role": "button", "aria-pressed": "false", "tabindex": "-1"}
            attributes["aria-label"] = picture.tips.get(gid, "")
            element.remove(element[0])
    elif gid:
        attributes["id"] = f"{picture.name}-{gid}"
    if _HREF in attributes and attributes[_HREF].startswith("#"):
        attributes[_HREF] = f"#{picture.name}-{attributes[_HREF][1:]}"
    for name in ("style", "clip-path", "fill", "stroke"):
        if name in attributes:
            attributes[name] = _in_page(attributes[name], picture.name)


def _in_page(value: str, name: str) -> str:
    def colour(match: re.Match[str]) -> str:
        return palette.variable(match[0])

    value = re.sub(r"url\(#", f"url(#{name}-", value)
    return re.sub(r"#[0-9a-fA-F]{6}\b", colour, value)
