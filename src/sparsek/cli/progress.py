"""Progress on standard error: a bar where that is a terminal, a line now and then where it is a log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any, Final, Protocol

import click

_EVERY_SECONDS: Final = 10.0  # at most one line in so long
_LINES: Final = 20  # and about so many in all, but of steps that have something to say
_shown: list[Any] = []  # the bar on the terminal, if there is one


class Advance(Protocol):
    """What is called after a step, or with the number of steps done, and with what came of them."""

    def __call__(self, steps: int = 1, said: str = "") -> None: ...


def status(text: str) -> contextlib.AbstractContextManager[object]:
    """A sign of life on stderr within the block, when that is a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    return console.status(text) if console.is_terminal else contextlib.nullcontext()


@contextlib.contextmanager
def without_bar() -> Iterator[None]:
    """Within the block the terminal is free for lines that stay; then the bar is there again."""
    bars = list(_shown)
    for bar in bars:
        bar.stop()
    try:
        yield
    finally:
        for bar in bars:
            bar.start()


@contextlib.contextmanager
def progress(description: str, total: int) -> Iterator[Advance]:
    """How far the work in the block is, of `total` steps; yields what tells of each."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Log(description, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # Its own way with standard output would send what belongs there to standard error.
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as bar:
        task = bar.add_task(description, total=total)

        def advance(steps: int = 1, said: str = "") -> None:  # noqa: ARG001  the table has it
            bar.advance(task, steps)

        _shown.append(bar)
        try:
            yield advance
        finally:
            _shown.remove(bar)


class _Log:
    """Lines that stay: `eval: 2048 of 8192, 25%, 0:01:10`. What a step has to say is a line at once."""

    def __init__(self, description: str, total: int) -> None:
        self._description, self._total = description, total
        self._done = self._told = 0
        self._begun = self._last = time.monotonic()

    def __call__(self, steps: int = 1, said: str = "") -> None:
        self._done += steps
        now = time.monotonic()
        due = now - self._last >= _EVERY_SECONDS and self._done - self._told >= self._total / _LINES
        if said or due:
            self._told, self._last = self._done, now
            click.echo(self._line(now - self._begun, said), err=True)

    def _line(self, seconds: float, said: str) -> str:
        minutes, second = divmod(round(seconds), 60)
        hour, minute = divmod(minutes, 60)
        line = f"{self._description}: {self._done} of {self._total}, {hour}:{minute:02}:{second:02}"
        return f"{line}, {said}" if said else line
