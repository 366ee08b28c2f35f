"""Real text for measurements: the Python manual's topics, which come with Python itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..engines.text import read_text_file, shown_name

DEFAULT_NAME = "pydoc_data.topics"


def read_text(path: str | None) -> tuple[str, str]:
    """(name, text) of the file given with --text, or of standard input for "-"; without one, of Python's own
    manual.

    Raises:
        OSError: the file cannot be read. ValueError: it is no text, or empty.
    """
    if path is None:
        from pydoc_data.topics import topics

        return DEFAULT_NAME, "\n".join(topics.values())
    text = read_text_file(path, "--text")
    if not text.strip():
        raise ValueError(f"the text is empty: {path}")
    return "standard input" if path == "-" else shown_name(Path(path).name), text


def take_tokens(engine: Any, text: str, count: int) -> list[int]:
    """The first `count` tokens of `text`, repeated where it is shorter."""
    tokens: list[int] = engine.encode(text)
    while len(tokens) < count:
        tokens = tokens + tokens
    return tokens[:count]
