"""Errors that are told in one line, and that line."""

from __future__ import annotations

import contextlib
import re
import traceback
from typing import Final

import click

from ..engines.text import shown_name
from ..extras import why_missing
from .streams import discard_output

FAILED: Final = 2
# What a wrong input or a missing part raises; anything else is a defect and shows its traceback.
_EXPECTED: Final = (
    click.ClickException,
    ValueError,
    TypeError,
    OSError,
    ImportError,
    NotImplementedError,
    MemoryError,
    OverflowError,
)
_LONGEST: Final = 500
_QUOTED_BYTE: Final = re.compile(r"\\udc([89a-f][0-9a-f])")  # as repr writes one that is no character


def is_expected(error: Exception) -> bool:
    if isinstance(error, RuntimeError) and "memory" in str(error):  # PyTorch's way of saying MemoryError
        return True
    return isinstance(error, _EXPECTED) or type(error).__name__ == "VerificationError"


def fail(error: Exception, debug: bool) -> int:
    """Tell the error, after its traceback when debugging; returns the exit code."""
    with contextlib.suppress(OSError):  # a full disk may be under standard error too
        if debug:
            click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
        click.echo(f"sparsek: {one_line(_message(error))}", err=True)
    if isinstance(error, OSError) and error.filename == "standard output":
        discard_output()
    return FAILED


def _message(error: Exception) -> str:
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, ModuleNotFoundError) and (why := why_missing(error.name)):
        return why
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return str(error) or type(error).__name__


def one_line(message: str) -> str:
    """Names as they can be shown, no control characters, and not too long."""
    message = _QUOTED_BYTE.sub(lambda byte: chr(0xDC00 + int(byte[1], 16)), message)
    words = " ".join(shown_name(message).split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."
