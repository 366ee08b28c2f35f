"""Text on its way in and names on their way out. Text is taken whole or refused, by one rule for all options,
files and engines; a name can always be shown, whatever its bytes are."""

from __future__ import annotations

import codecs
import contextlib
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from .naming import naming

_UNFIT: Final = re.compile("[\0\ud800-\udfff]")
_NO_BYTE: Final = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # the other halves stand for bytes of names


def check_text(text: str, where: str = "the text") -> str:
    """`text` as it is, if every engine can take it whole.

    Args:
        where: it comes from, as the message names it.

    Raises:
        ValueError: it has a zero byte, where C ends a text, or half of a surrogate pair, which UTF-8 has no
            bytes for.
    """
    found = _UNFIT.search(text)
    if found is None:
        return text
    if found[0] == "\0":
        raise ValueError(f"{where} has a zero byte (U+0000), at character {found.start()}: take it out")
    raise ValueError(f"{where} is not UTF-8 text: {found[0]!r} at character {found.start()}")


def option_text(text: str, option: str) -> str:
    """The text given with `option` on the command line, checked. In a C locale Python takes it for ASCII and
    hands over other bytes one by one: here they are put together again.

    Raises:
        ValueError: as `check_text`.
    """
    with contextlib.suppress(UnicodeEncodeError):
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    return _unix_lines(check_text(text, option))


def decode_text(data: bytes, where: str) -> str:
    """The bytes of a file as text: UTF-8, without a byte order mark, with line ends of one character.

    Raises:
        ValueError: it is not UTF-8 or has a zero byte; the message says at which byte.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not a UTF-8 text ({error.reason} at byte {error.start})") from None
    if "\0" in text:
        raise ValueError(f"{where} has a zero byte (U+0000), at byte {data.index(0)}: take it out")
    return _unix_lines(text.removeprefix(codecs.BOM_UTF8.decode()))


def read_text_file(path: str, option: str) -> str:
    """The text of the file that `option` names; "-" is standard input.

    Raises:
        OSError: it cannot be read. ValueError: as `decode_text`.
    """
    if path != "-":
        return decode_text(Path(path).read_bytes(), f"{option} {path}")
    if sys.stdin is None:
        raise ValueError(f"{option} - reads standard input, and there is none")
    with naming("standard input"):
        data = sys.stdin.buffer.read()
    return decode_text(data, "standard input")


def _unix_lines(text: str) -> str:
    return text.replace("\r\n", "\n")


def whole_characters(pieces: Iterable[bytes]) -> Iterator[str]:
    """Texts of UTF-8, as they come: the bytes of a character that is not whole yet are held back. Bytes that
    are no character become U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for piece in pieces:
        text = decoder.decode(piece)
        if text:
            yield text


def shown_name(name: str) -> str:
    """A file's name as text that UTF-8 can hold: what is no character becomes an escape, \\xe9."""
    name = _NO_BYTE.sub(lambda half: f"\\u{ord(half[0]):04x}", name)
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def first_line(error: Exception) -> str:
    """An error of a library in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
