"""The page's colours. A picture is drawn once, in the light ones; on the page each becomes a CSS variable,
which has a light and a dark value, and in a file it stays as it is."""

from __future__ import annotations

from typing import Final

# role: (light, dark). The light values are unlike each other and unlike those of the colour maps, because a
# drawing's colour is recognised by its value.
COLOURS: Final = {
    "paper": ("#ffffff", "#15191e"),
    "ink": ("#1f2328", "#e4e8ec"),
    "muted": ("#57606a", "#a3adb8"),
    "grid": ("#dde1e6", "#363d45"),
    "dense": ("#b3510c", "#f2a65a"),
    "sparse": ("#1b5fd0", "#79aaff"),
    "third": ("#11763f", "#56c98a"),
    "fourth": ("#a3206f", "#f08cc6"),
    "dropped": ("#f1c9ae", "#6d3f22"),
    "forbidden": ("#eceff2", "#22272e"),
}
PAPER, INK, MUTED, GRID, DENSE, SPARSE, THIRD, FOURTH, DROPPED, FORBIDDEN = (
    light for light, _ in COLOURS.values()
)
SERIES: Final = (SPARSE, THIRD, FOURTH, DENSE)
# Marks on a colour map keep their colour in the dark, as the map does: nearly white and nearly black.
ON_MAP, ON_MAP_EDGE = "#fefefe", "#010101"

_BY_VALUE: Final = {light: f"var(--{role})" for role, (light, _) in COLOURS.items()}


def variable(colour: str) -> str:
    """The CSS variable of a colour of the palette; any other colour as it is."""
    return _BY_VALUE.get(colour.lower(), colour)


def css() -> str:
    """The declarations of all variables."""
    return "\n".join(f"  --{role}: light-dark({light}, {dark});" for role, (light, dark) in COLOURS.items())
