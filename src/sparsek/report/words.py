"""Text from outside, made fit to be shown: in XML, in UTF-8 and by Matplotlib."""

from __future__ import annotations

from typing import Any


def shown(text: str) -> str:
    """`text` with signs for the characters that have no shape or that XML forbids."""
    return "".join(map(_sign, text))


def shown_all(value: Any) -> Any:
    """The same for every text in a JSON value, names of fields too."""
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, list):
        return [shown_all(x) for x in value]
    if isinstance(value, dict):
        return {shown(name): shown_all(x) for name, x in value.items()}
    return value


def token_text(token: str) -> str:
    """A token's text as a label: without the space before a word."""
    return shown(token.strip(" ") or ("␣" if token else "[special]"))


def _sign(character: str) -> str:
    code = ord(character)
    if character == "\n":
        return "↵"
    if code < 0x20:
        return chr(0x2400 + code)  # the control picture
    unusable = 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000 or code in (0xFFFE, 0xFFFF)
    return "�" if unusable else character
