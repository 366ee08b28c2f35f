"""How what is missing is installed: the extras of pyproject.toml."""

from __future__ import annotations


def how_to_install(extra: str) -> str:
    """The command that brings an extra. sparsek is not on PyPI, so it needs a clone."""
    return f"pip install '.[{extra}]' in a clone of sparsek"
