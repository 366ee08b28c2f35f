"""What becomes of text on its way in, and of names on their way out."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from sparsek.engines.text import check_text, decode_text, option_text, read_text_file, shown_name


def test_text_that_is_taken_whole() -> None:
    assert check_text("é\n\t\x1b \U0001f642", "-p") == "é\n\t\x1b \U0001f642"
    assert decode_text("\ufeffa\r\nb\rc\n\ufeff".encode(), "f") == "a\nb\rc\n\ufeff"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ab\0c", r"^-p has a zero byte \(U\+0000\), at character 2: take it out$"),
        ("a\udcff", r"^-p is not UTF-8 text: '\\udcff' at character 1$"),
        ("\ud800\0", r"'\\ud800' at character 0"),
    ],
)
def test_text_that_would_be_cut(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_text(text, "-p")


def test_text_of_an_option_is_put_together_in_a_c_locale() -> None:
    assert option_text("caf\udcc3\udca9\r\nau lait", "-p") == "café\nau lait"
    for text, message in (("\udcc3", "'.udcc3' at "), ("\ud800", "'.ud800'"), ("é\0", "r 1")):
        with pytest.raises(ValueError, match=rf"^-p .*{message}"):
            option_text(text, "-p")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xc3\xa9\0", r"^f has a zero byte \(U\+0000\), at byte 2"),
        (b"\xef\xbb\xbfa\0", r"at byte 4"),
        (b"a\xff\0", r"^f is not a UTF-8 text \(invalid start byte at byte 1\)$"),
        (b"\xed\xb3\xbf", "not a UTF-8 text"),  # half of a pair
        ("text".encode("utf-16"), "not a UTF-8 text"),
    ],
)
def test_files_that_are_no_text(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_text(data, "f")


def test_a_file_and_standard_input_are_read_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(file.read_bytes())))
    assert read_text_file(str(file), "-f") == read_text_file("-", "-f") == "one\ntwo"
    file.write_bytes(b"a\0")
    with pytest.raises(ValueError, match=rf"^-f {file} has a zero byte"):
        read_text_file(str(file), "-f")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="-f - reads standard input, and there is none"):
        read_text_file("-", "-f")


def test_standard_input_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Folder(io.RawIOBase):
        def readall(self) -> bytes:
            raise IsADirectoryError(21, "Is a directory")

        def readable(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Folder()))  # type: ignore[arg-type]
    with pytest.raises(IsADirectoryError) as caught:
        read_text_file("-", "-f")
    assert caught.value.filename == "standard input"


def test_every_name_can_be_shown() -> None:
    assert shown_name("a b|é.gguf") == "a b|é.gguf"
    assert shown_name("caf\udce9.gguf") == "caf\\xe9.gguf"
    assert shown_name("caf\udcc3\udca9.gguf") == "café.gguf"  # as a C locale gives it
    assert shown_name("\ud800\udcff") == "\\ud800\\xff"
