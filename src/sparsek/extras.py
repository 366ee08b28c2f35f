"""How what is missing is installed: the extras of pyproject.toml."""

from __future__ import annotations

from typing import Final

# By the name under which they are imported: what brings packages that commands cannot do without.
EXTRAS: Final = {
    "click": "cli",
    "rich": "cli",
    "torch": "transformers",
    "transformers": "transformers",
    "accelerate": "transformers",
    "gguf": "transformers",
    "jinja2": "transformers",
    "xllamacpp": "llama",
    "matplotlib": "report",
    "triton": "triton",
}


def how_to_install(extra: str) -> str:
    """The command that brings an extra. sparsek is not on PyPI, so it needs a clone."""
    return f"pip install '.[{extra}]' in a clone of sparsek"


def why_missing(package: str | None) -> str | None:
    """What to say when an import fails for want of a package; None where it is none of an extra."""
    extra = EXTRAS.get((package or "").partition(".")[0])
    return extra and f"{package} is not installed: {how_to_install(extra)}"
