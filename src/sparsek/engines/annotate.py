"""A Sparse-K configuration inside GGUF files: a copy of a model with other `sparsek.*` metadata.

Only what precedes the tensors is written anew, and of that only the number of fields, our own fields and the
padding at the end differ: everything else is copied byte by byte, whatever its type. Where shards become one
file, the fields that make them shards go, and tensors move.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from ..config import SparseKConfig
from .gguf_header import GgufHeader, TensorPlace
from .gguf_model import GgufModel, read_model, shard_name, shard_path
from .naming import naming

_PREFIX: Final = "sparsek."
_OF_SHARDS: Final = "split."
_COUNTS_AT: Final = 8  # the numbers of tensors and fields come after magic and version
_UINT32, _STRING = 4, 8  # GGUF's numbers for the types that our fields have
_PIECE: Final = 4 << 20  # bytes copied at once


@dataclass(frozen=True)
class Annotated:
    """`files`: what was written. `removed`: the source's `sparsek.*` keys, which the copy does not keep."""

    files: tuple[Path, ...]
    removed: tuple[str, ...]


def annotate(source: Path, target: Path, config: SparseKConfig | None, *, force: bool = False) -> Annotated:
    """Copy a model and give the copy the metadata of `config`, or none of ours when that is None.

    The copy appears under its name only when it is whole.

    Args:
        source: a GGUF file; the first where there are several.
        target: of one file; or, named as the first of as many shards as `source` has, of these.
        force: replace what is there.

    Raises:
        FileNotFoundError: there is no such file. FileExistsError: `target` exists and `force` is off.
        ValueError: `source` is not a whole model, or `target` cannot take its copy.
    """
    if not source.is_file():
        raise FileNotFoundError(f"no such file: {str(source)!r}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no such directory: {str(target.parent)!r}")
    model = read_model(source)
    targets = _targets(model, target)
    for file in targets:
        _check_target(model.files, file, force=force)
    with naming(target), _replacing(targets) as files:
        if len(targets) == len(model.files):
            _copy(model, config, files)
        else:
            _join(model, config, files[0])
    removed = tuple(name for name in model.metadata if name.startswith(_PREFIX))
    return Annotated(targets, removed)


def _targets(model: GgufModel, target: Path) -> tuple[Path, ...]:
    """Where the copy goes: one file, or as many as the model has."""
    count, named = len(model.files), shard_name(target)
    if count == 1 or named is None:
        return (target,)
    if named[1:] != (0, count):
        first = shard_path(Path(), named[0], 0, count)
        raise ValueError(
            f"the model has {count} shards: name the first, {first}, or one file for all: {target}"
        )
    return tuple(shard_path(target.parent, named[0], i, count) for i in range(count))


def _check_target(sources: Iterable[Path], target: Path, *, force: bool) -> None:
    if not target.exists():
        return
    if any(target.samefile(source) for source in sources):
        raise ValueError(f"input and output are the same file: {target}")
    if not target.is_file():
        raise ValueError(f"the output exists and is not a file: {target}")
    if not force:
        raise FileExistsError(f"the output exists (--force replaces it): {target}")


@contextlib.contextmanager
def _replacing(targets: Sequence[Path]) -> Iterator[list[IO[bytes]]]:
    """Temporary files beside the targets, which take their places at the end, the first of them last, or else
    disappear."""
    with contextlib.ExitStack() as temporary:
        files = [temporary.enter_context(_temporary(target)) for target in targets]
        yield files
        for file, target in reversed(list(zip(files, targets, strict=True))):
            os.replace(file.name, target)


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[IO[bytes]]:
    """A file beside the target; at the end it is gone, if it still has its name."""
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
        try:
            yield file
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file.name)


def _copy(model: GgufModel, config: SparseKConfig | None, files: Sequence[IO[bytes]]) -> None:
    """File by file; the first has the metadata."""
    for i, (source, header, out) in enumerate(zip(model.files, model.headers, files, strict=True)):
        with source.open("rb") as data:
            if i == 0:
                start = data.read(header.data_offset)
                described = [start[t.start : t.stop] for t in header.tensors]
                out.write(_written_anew(header, start, config, described))
            shutil.copyfileobj(data, out, _PIECE)
        _like(source, out)


def _join(model: GgufModel, config: SparseKConfig | None, out: IO[bytes]) -> None:
    """All shards in one file."""
    alignment, at = model.headers[0].alignment, 0
    described = []
    for source, header in zip(model.files, model.headers, strict=True):
        start = _start(source, header)
        for tensor in header.tensors:
            described.append(start[tensor.start : tensor.stop - 8] + struct.pack("<Q", at))
            at += tensor.size + -tensor.size % alignment
    first = _start(model.path, model.headers[0])
    out.write(_written_anew(model.headers[0], first, config, described, without=(_PREFIX, _OF_SHARDS)))
    for source, header in zip(model.files, model.headers, strict=True):
        with source.open("rb") as data:
            for tensor in header.tensors:
                _copy_tensor(data, header, tensor, out)
                out.write(bytes(-tensor.size % alignment))
    _like(model.path, out)


def _copy_tensor(data: IO[bytes], header: GgufHeader, tensor: TensorPlace, out: IO[bytes]) -> None:
    data.seek(header.data_offset + tensor.offset)
    for start in range(0, tensor.size, _PIECE):
        out.write(data.read(min(_PIECE, tensor.size - start)))


def _start(file: Path, header: GgufHeader) -> bytes:
    """All that precedes the tensors."""
    with file.open("rb") as data:
        return data.read(header.data_offset)


def _like(source: Path, out: IO[bytes]) -> None:
    """Whole, and with the permissions of the file that it copies."""
    out.flush()
    os.chmod(out.name, source.stat().st_mode & 0o666)


def _written_anew(
    header: GgufHeader,
    start: bytes,
    config: SparseKConfig | None,
    described: Sequence[bytes],
    without: tuple[str, ...] = (_PREFIX,),
) -> bytes:
    """All that is to precede the tensors; `start` is what did so far, `described` the tensors' descriptions.
    `without`: how the names of fields begin that go."""
    kept = [start[slice(*span)] for name, span in header.spans.items() if not name.startswith(without)]
    added = [_field(name, v) for name, v in (config.to_gguf_metadata() if config else {}).items()]
    counts = struct.pack("<QQ", len(described), len(kept) + len(added))
    written = b"".join([start[:_COUNTS_AT], counts, *kept, *added, *described])
    return written + bytes(-len(written) % header.alignment)


def _field(name: str, value: str | int) -> bytes:
    if isinstance(value, int):
        return _text(name) + struct.pack("<II", _UINT32, value)
    return _text(name) + struct.pack("<I", _STRING) + _text(value)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
