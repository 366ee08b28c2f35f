"""The part of a GGUF file before its tensors. The format is that of ggml's gguf.h.

The package `gguf` makes an object of every word of the vocabulary, which takes it 15 seconds where there are
262,144; here they are passed over.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
# GGUF's numbers for the types of fields, as struct has them.
_NUMBERS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEEPEST: Final = 4  # arrays of arrays
_FIELDS_AT: Final = 24  # after magic, version, and the numbers of tensors and fields


class TensorPlace(NamedTuple):
    """Where a tensor is described, [start, stop) in bytes, and where its `size` bytes lie: `offset` after the
    beginning of all tensors. The description ends with that offset, as 8 bytes."""

    start: int
    stop: int
    offset: int
    size: int


@dataclass(frozen=True)
class GgufHeader:
    """What a file says of itself.

    Attributes:
        metadata: fields by name; an array is None.
        spans: where each field stands, [start, stop) in bytes.
        tensors: where they are, in the order of their descriptions.
        data_offset: where the tensors begin. alignment: of that place and of each tensor, in bytes.
    """

    metadata: dict[str, Any]
    spans: dict[str, tuple[int, int]]
    tensors: tuple[TensorPlace, ...]
    data_offset: int
    alignment: int


def read_header(file: Path) -> GgufHeader:
    """Read and check it.

    Raises:
        ValueError: the file is not GGUF, is damaged, or is shorter than its header says.
    """
    with file.open("rb") as opened:
        start = opened.read(_FIELDS_AT)
        if start[:4] != _MAGIC:
            begins = f"it begins with {start[:4].decode('latin-1')!r}" if start else "it is empty"
            raise ValueError(f"not a GGUF file ({begins}): {file}")
        if len(start) < _FIELDS_AT:
            raise ValueError(f"damaged or truncated GGUF file (it has {len(start)} bytes): {file}")
        version, num_tensors, num_fields = struct.unpack("<4xIQQ", start)
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            reason = (
                "is for machines of another byte order" if swapped else f"has the unknown version {version}"
            )
            raise ValueError(f"the GGUF file {reason}: {file}")
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                header = _Scan(data).header(num_fields, num_tensors)
            except (struct.error, ValueError, OverflowError, KeyError) as error:
                raise ValueError(f"damaged or truncated GGUF file ({error}): {file}") from None
            size = len(data)
    end = header.data_offset + max((t.offset + t.size for t in header.tensors), default=0)
    if end > size and header.tensors:
        raise ValueError(f"truncated GGUF file (it has {size} bytes, its header describes {end}): {file}")
    return header


class _Scan:
    """Goes through the bytes; whatever lies beyond their end is an error."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._size, self._at = data, len(data), _FIELDS_AT

    def header(self, num_fields: int, num_tensors: int) -> GgufHeader:
        metadata, spans = {}, {}
        for _ in range(num_fields):
            start, name = self._at, self._text()
            metadata[name] = self._value(self._number("I"))
            spans[name] = (start, self._at)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"its alignment is {alignment!r}")
        tensors = tuple([self._tensor() for _ in range(num_tensors)])
        data_offset = -(-self._at // alignment) * alignment
        return GgufHeader(metadata, spans, tensors, data_offset, alignment)

    def _tensor(self) -> TensorPlace:
        start, name, axes = self._at, self._text(), self._number("I")
        if axes > 8:
            raise ValueError(f"the tensor {name[:80]!r} has {axes} axes")
        count = math.prod(self._number("Q") for _ in range(axes))
        kind, offset = self._number("I"), self._number("Q")
        try:
            block, size = _block_sizes()[kind]
        except KeyError:
            raise ValueError(f"the tensor {name[:80]!r} has the unknown type {kind}") from None
        return TensorPlace(start, self._at, offset, count // block * size)

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            return self._number(_NUMBERS[kind])
        inner, count = self._number("I"), self._number("Q")
        if inner in _NUMBERS:
            self._skip(count * struct.calcsize(_NUMBERS[inner]))
        elif depth >= _DEEPEST or count > self._size:
            raise ValueError(f"an array of {count} values")
        elif inner == _STRING:
            for _ in range(count):
                self._skip(self._number("Q"))
        else:
            for _ in range(count):
                self._value(inner, depth + 1)
        return None

    def _number(self, form: str) -> Any:
        (value,) = struct.unpack_from("<" + form, self._data, self._at)
        self._at += struct.calcsize("<" + form)
        return value

    def _text(self) -> str:
        length = self._number("Q")
        start = self._at
        self._skip(length)
        return self._data[start : self._at].decode("utf-8", errors="replace")

    def _skip(self, count: int) -> None:
        self._at += count
        if self._at > self._size:
            raise ValueError(f"something ends at byte {self._at} of {self._size}")


@cache
def _block_sizes() -> dict[int, tuple[int, int]]:
    """GGUF's number of a tensor type: numbers in a block, and its bytes."""
    from gguf import GGML_QUANT_SIZES

    return {kind.value: sizes for kind, sizes in GGML_QUANT_SIZES.items()}
