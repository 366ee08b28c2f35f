"""Standard output and standard error of the command: they take every character, and an error has a name."""

from __future__ import annotations

import codecs
import io
import os
import sys
from typing import Any, Final

from ..engines.naming import naming

_ERRORS: Final = "backslashreplace"  # for what the locale's characters cannot show


class _StandardOutput(io.FileIO):
    """Says in its errors what could not be written, as those of files do."""

    def write(self, data: Any, /) -> int:
        with naming("standard output"):
            return super().write(data)


def prepare() -> None:
    """Once, where the process is the command's own. In a C locale text goes out as UTF-8, as click has it. Of
    several processes that do the same for one model, as `torchrun` starts them, the first one speaks."""
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  as long as the process
        return
    if isinstance(sys.stdout, io.TextIOWrapper):
        raw = _StandardOutput(sys.stdout.fileno(), "w", closefd=False)
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(raw), _encoding(sys.stdout), _ERRORS, line_buffering=sys.stdout.line_buffering
        )
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(encoding=_encoding(sys.stderr), errors=_ERRORS)


def _encoding(stream: io.TextIOWrapper) -> str:
    return "utf-8" if codecs.lookup(stream.encoding).name == "ascii" else stream.encoding


def discard_output() -> None:
    """What is still to be written has nowhere to go: without this, Python tries again at its end."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
