"""A Sparse-K configuration inside a GGUF file: a copy of the file with other `sparsek.*` metadata.

Only what precedes the tensors is written anew, and of that only the number of fields, our own fields and the
padding at the end differ: everything else is copied byte by byte, whatever its type.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

from ..config import SparseKConfig
from .gguf_header import GgufHeader, read_header

_PREFIX: Final = "sparsek."
_COUNT_AT: Final = 16  # the number of fields comes after magic, version and the number of tensors
_UINT32, _STRING = 4, 8  # GGUF's numbers for the types that our fields have
_PIECE: Final = 4 << 20  # bytes copied at once


def annotate(source: Path, target: Path, config: SparseKConfig | None, *, force: bool = False) -> list[str]:
    """Copy a GGUF file and give the copy the metadata of `config`, or none of ours when that is None.

    The copy appears under its name only when it is whole.

    Returns:
        The `sparsek.*` keys that `source` has, which the copy does not keep.

    Raises:
        FileNotFoundError: there is no such file. FileExistsError: `target` exists and `force` is off.
        ValueError: `source` is not a whole GGUF file, or `target` cannot take its copy.
    """
    if not source.is_file():
        raise FileNotFoundError(f"no such file: {str(source)!r}")
    _check_target(source, target, force=force)
    header = read_header(source)
    with _replacing(target) as out, source.open("rb") as data:
        out.write(_written_anew(header, data.read(header.data_offset), config))
        shutil.copyfileobj(data, out, _PIECE)
        os.chmod(out.name, source.stat().st_mode & 0o666)
    return [name for name in header.metadata if name.startswith(_PREFIX)]


def _check_target(source: Path, target: Path, *, force: bool) -> None:
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no such directory: {str(target.parent)!r}")
    if not target.exists():
        return
    if target.samefile(source):
        raise ValueError(f"input and output are the same file: {target}")
    if not target.is_file():
        raise ValueError(f"the output exists and is not a file: {target}")
    if not force:
        raise FileExistsError(f"the output exists (--force replaces it): {target}")


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[IO[bytes]]:
    """A temporary file beside `target`, which takes its place at the end or else disappears."""
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
        try:
            yield file
            file.flush()
            os.replace(file.name, target)
        except BaseException:
            os.unlink(file.name)
            raise


def _written_anew(header: GgufHeader, data: bytes, config: SparseKConfig | None) -> bytes:
    """All that precedes the tensors; `data` is what did so far."""
    kept = [data[slice(*span)] for name, span in header.spans.items() if not name.startswith(_PREFIX)]
    added = [_field(name, v) for name, v in (config.to_gguf_metadata() if config else {}).items()]
    parts = [
        data[:_COUNT_AT],
        struct.pack("<Q", len(kept) + len(added)),
        *kept,
        *added,
        data[slice(*header.tensors)],
    ]
    written = b"".join(parts)
    return written + bytes(-len(written) % header.alignment)


def _field(name: str, value: str | int) -> bytes:
    if isinstance(value, int):
        return _text(name) + struct.pack("<II", _UINT32, value)
    return _text(name) + struct.pack("<I", _STRING) + _text(value)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
