"""Ctrl-C while the command is still being loaded: one line, as later on. Nothing is done where Python was not
started as the command, so that a program that imports sparsek has its interrupts as it likes."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130  # what shells say of a command that Ctrl-C has ended
MESSAGE = "sparsek: interrupted"


def stop_quietly() -> None:
    """From now on, until `raise_as_usual`, Ctrl-C ends the process at once."""
    if _is_the_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)


def raise_as_usual() -> None:
    """Ctrl-C is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_the_command() -> bool:
    """Whether Python was started as `sparsek`, or as `python -m sparsek`, whose name is "-m" at first."""
    program = sys.argv[0] if sys.argv else ""
    return os.path.basename(program) == "sparsek" or (program == "-m" and "sparsek" in sys.orig_argv)


def _stop(_signal: int, _frame: FrameType | None) -> None:
    try:
        os.write(2, f"{MESSAGE}\n".encode())
    finally:
        os._exit(INTERRUPTED)


stop_quietly()  # to import this module is to begin
