"""What llama.cpp's server writes to its log: its errors are passed on, and of each answer one line is made.

The server has no other way to tell of an answer, whatever interface it was asked through. It writes to C's
`stderr`, which is a variable that glibc lets us set: it is pointed at a pipe of ours, and the process's own
standard error stays what it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from ..integrations import llama_cpp as integration

_LINE: Final = re.compile(r"[\d.]+ ([A-Z]) (.*)")  # when, level, message
_OF_SLOT: Final = re.compile(r"slot +\S+: +id +(\d+) \| task +(-?\d+) \| +(.*)")
_TIME: Final = re.compile(r"(prompt )?eval time = +([\d.]+) ms / +(\d+) tokens")
_END: Final = re.compile(r"stop processing: n_tokens = (\d+)")
_REFUSED: Final = re.compile(r"srv +send_error: task id = (\d+), error: (.*)")
_OURS: Final = "sparsek: "  # lines of the backend
_LINE_BUFFERED: Final = 1  # _IOLBF
_SECONDS: Final = 5.0  # at most, for what was written to be read


@dataclass
class Answer:
    """One answer of the server. `read` tokens of the prompt were computed, in `read_seconds`, `cached` ones
    taken from the cache; `written` tokens in `write_seconds`, which begin after the first. `sparse`: Sparse-K
    ran on it. `error`: why there is none; `broken_off`: the client went away."""

    read: int = 0
    cached: int = 0
    written: int = 0
    read_seconds: float = 0.0
    write_seconds: float = 0.0
    sparse: bool = False
    tokens: int = 0
    error: str | None = None
    broken_off: bool = False


@dataclass
class _Slot:
    task: int
    found: Answer = field(default_factory=Answer)
    is_timed: bool = False


class ServerLog:
    """Takes the log line by line.

    Args:
        describe: an answer as a line.
        pass_on: called with the lines that are for the user: answers, and errors, or everything with `show`.
        min_context: fewer tokens than this are dense.
        unsaid: so many answers, the first ones, are nobody's.
        sparse: attention operations with Sparse-K so far, in all. One setting serves all answers: where it is
            ever used, it is in each that is long enough. Counting by answer would race with the log.
    """

    def __init__(
        self,
        describe: Callable[[Answer], str],
        pass_on: Callable[[str], None],
        *,
        min_context: int,
        unsaid: int = 0,
        show: bool = False,
        sparse: Callable[[], int] = lambda: integration.counts().sparse,
    ) -> None:
        self._describe, self._pass_on, self._show = describe, pass_on, show
        self._min_context, self._unsaid, self._sparse = min_context, unsaid, sparse
        self._slots: dict[str, _Slot] = {}
        self._refused: dict[int, str] = {}
        self._is_error = False

    def feed(self, line: str) -> None:
        """A line, without its end."""
        parsed = _LINE.fullmatch(line)
        if parsed is None:  # more of the message before
            if self._show or self._is_error or line.startswith(_OURS):
                self._pass_on(line)
            return
        level, message = parsed.groups()
        refused, of_slot = _REFUSED.match(message), _OF_SLOT.match(message)
        self._is_error = level == "E" and refused is None
        if self._show or self._is_error:
            self._pass_on(line)
        if refused is not None:
            self._refused[int(refused[1])] = refused[2]
        elif of_slot is not None:
            self._of_slot(of_slot[1], int(of_slot[2]), of_slot[3])

    def _of_slot(self, slot: str, task: int, message: str) -> None:
        if message.startswith("processing task"):
            self._slots[slot] = _Slot(task)
        at = self._slots.get(slot)
        if at is None or at.task != task:
            return
        if time := _TIME.match(message):
            at.is_timed = True
            if time[1]:
                at.found.read_seconds, at.found.read = float(time[2]) / 1000, int(time[3])
            else:
                at.found.write_seconds, at.found.written = float(time[2]) / 1000, int(time[3])
        elif end := _END.match(message):
            del self._slots[slot]
            answer = self._ended(at, int(end[1]))
            if self._unsaid:
                self._unsaid -= 1
            else:
                self._pass_on(self._describe(answer))

    def _ended(self, at: _Slot, tokens: int) -> Answer:
        """`tokens`: those in the cache, to which the last one that was written does not belong."""
        found = at.found
        found.tokens = tokens
        found.cached = max(0, tokens - max(0, found.written - 1) - found.read) if at.is_timed else 0
        found.error = self._refused.pop(at.task, None)
        found.broken_off = found.error is None and not at.is_timed
        found.sparse = tokens >= self._min_context and self._sparse() > 0
        return found


class Tap:
    """From now on, what C code of this process writes to `stderr` goes to `feed`, line by line, in a thread
    of its own."""

    def __init__(self, feed: Callable[[str], None]) -> None:
        self._feed = feed
        self._drained = threading.Event()
        reading, self._writing = os.pipe()
        libc: Any = ctypes.CDLL(None)
        libc.fdopen.restype = ctypes.c_void_p
        libc.setvbuf.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
        file = libc.fdopen(self._writing, b"w")
        libc.setvbuf(file, None, _LINE_BUFFERED, 0)
        self._variable = ctypes.c_void_p.in_dll(libc, "stderr")
        self._before, self._variable.value = self._variable.value, file
        threading.Thread(target=self._read, args=(reading,), daemon=True).start()

    def close(self) -> None:
        """Put `stderr` back, when all that was written is fed. The file stays: a thread may be using it."""
        self._variable.value = self._before
        os.write(self._writing, b"\0\n")
        self._drained.wait(_SECONDS)

    def _read(self, reading: int) -> None:
        with os.fdopen(reading, encoding="utf-8", errors="replace", newline="\n") as lines:
            for line in lines:
                if line.endswith("\0\n"):
                    self._drained.set()
                else:
                    self._feed(line.removesuffix("\n"))


def to_standard_error(line: str) -> None:
    """As a line, at once; the server goes on where nobody takes it any more."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)
