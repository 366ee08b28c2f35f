"""The part of a GGUF file before its tensors. The format is that of ggml's gguf.h.

The package `gguf` makes an object of every word of the vocabulary, which takes it 15 seconds where there are
262,144; here they are passed over.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
# GGUF's numbers for the types of fields, as struct has them.
_NUMBERS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEEPEST: Final = 4  # arrays of arrays
_FIELDS_AT: Final = 24  # after magic, version, and the numbers of tensors and fields


@dataclass(frozen=True)
class GgufHeader:
    """What a file says of itself.

    Attributes:
        metadata: fields by name; an array is None.
        spans: where each field stands, [start, stop) in bytes. tensors: where the descriptions of tensors do.
        data_offset: where the tensors begin. alignment: of that place, in bytes.
    """

    metadata: dict[str, Any]
    spans: dict[str, tuple[int, int]]
    tensors: tuple[int, int]
    data_offset: int
    alignment: int


def read_header(file: Path) -> GgufHeader:
    """Read and check it.

    Raises:
        ValueError: the file is not GGUF, has no model in it, is damaged, or is shorter than its header says.
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
                header, end = _Scan(data).header(num_fields, num_tensors)
            except (struct.error, ValueError, OverflowError, KeyError) as error:
                raise ValueError(f"damaged or truncated GGUF file ({error}): {file}") from None
            size = len(data)
    if not num_tensors or "general.architecture" not in header.metadata:
        raise ValueError(f"the GGUF file has no model in it: {file}")
    if end > size:
        raise ValueError(f"truncated GGUF file (it has {size} bytes, its header describes {end}): {file}")
    return header


class _Scan:
    """Goes through the bytes; whatever lies beyond their end is an error."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._size, self._at = data, len(data), _FIELDS_AT

    def header(self, num_fields: int, num_tensors: int) -> tuple[GgufHeader, int]:
        """The header, and where the last tensor ends."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        metadata, spans = {}, {}
        for _ in range(num_fields):
            start, name = self._at, self._text()
            metadata[name] = self._value(self._number("I"))
            spans[name] = (start, self._at)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"its alignment is {alignment!r}")
        first, last = self._at, 0
        for _ in range(num_tensors):
            name = self._text()
            axes = self._number("I")
            if axes > 8:
                raise ValueError(f"the tensor {name[:80]!r} has {axes} axes")
            count = 1
            for _ in range(axes):
                count *= self._number("Q")
            kind, offset = self._number("I"), self._number("Q")
            try:
                block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            except ValueError:
                raise ValueError(f"the tensor {name[:80]!r} has the unknown type {kind}") from None
            last = max(last, offset + count // block * size)
        span = (first, self._at)
        data_offset = -(-self._at // alignment) * alignment
        return GgufHeader(metadata, spans, span, data_offset, alignment), data_offset + last

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
