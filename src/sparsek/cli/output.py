"""Records to standard output, as a table or as data; progress to standard error."""

from __future__ import annotations

import contextlib
import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import click

from ..report.tables import markdown_table

FORMATS: Final = ("md", "csv", "json", "jsonl")

output_option = click.option(
    "-o", "--output", type=click.Choice(FORMATS), default="md", show_default=True, help="Output format."
)

Column = tuple[str, Callable[[Any], str]]


def write_records(records: Sequence[Any], fmt: str, columns: Sequence[Column]) -> None:
    """`records` are dataclasses. md shows `columns` (title, text of a record), the others every field."""
    if fmt == "md":
        write_table(records, columns)
        return
    rows = [asdict(record) for record in records]
    if fmt == "json":
        click.echo(json.dumps(rows, indent=2))
    elif fmt == "jsonl":
        for row in rows:
            click.echo(json.dumps(row))
    else:
        _write_csv(rows)


def write_table(records: Sequence[Any], columns: Sequence[Column]) -> None:
    click.echo(
        markdown_table([title for title, _ in columns], [[text(r) for _, text in columns] for r in records])
    )


def _write_csv(rows: Sequence[dict[str, Any]]) -> None:
    if not rows:
        return
    writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: json.dumps(v) if isinstance(v, (dict, list)) else v for k, v in row.items()})


def write_file(path: str, text: str) -> None:
    """UTF-8. Raises OSError that names the path, whatever goes wrong."""
    try:
        Path(path).write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None


def status(text: str) -> contextlib.AbstractContextManager[object]:
    """A sign of life on stderr within the block, when that is a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    return console.status(text) if console.is_terminal else contextlib.nullcontext()


@contextlib.contextmanager
def progress(description: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar with time left on stderr when that is a terminal; yields what to call after each step, or with
    the number of steps done."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda steps=1: bar.advance(task, steps)
