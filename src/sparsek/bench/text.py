"""Real text for measurements: the Python manual's topics, which come with Python itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

DEFAULT_NAME = "pydoc_data.topics"


def read_text(path: str | None) -> tuple[str, str]:
    """(name, text) of a UTF-8 file, of standard input for "-"; of Python's own manual without one.

    Raises:
        OSError: the file cannot be read. ValueError: it is empty or not UTF-8.
    """
    if path is None:
        from pydoc_data.topics import topics

        return DEFAULT_NAME, "\n".join(topics.values())
    if path == "-" and sys.stdin is None:
        raise ValueError("--text - reads standard input, and there is none")
    data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    name = "standard input" if path == "-" else Path(path).name
    try:
        text = data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"not a UTF-8 text ({error.reason} at byte {error.start}): {path}") from None
    if "\0" in text:
        raise ValueError(f"not a text, there are null bytes in it: {path}")
    if not text.strip():
        raise ValueError(f"the text is empty: {path}")
    return name, text


def take_tokens(engine: Any, text: str, count: int) -> list[int]:
    """The first `count` tokens of `text`, repeated where it is shorter."""
    tokens: list[int] = engine.encode(text)
    while len(tokens) < count:
        tokens = tokens + tokens
    return tokens[:count]
