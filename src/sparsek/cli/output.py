"""Records to standard output, as a table or as data, each as soon as it is complete; and files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any, Final, NamedTuple

import click

from ..engines.naming import naming
from ..engines.text import shown_name
from ..report.tables import Layout, budget_text, cell_width
from .progress import without_bar

FORMATS: Final = ("md", "csv", "json", "jsonl")

output_option = click.option(
    "-o",
    "--output",
    type=click.Choice(FORMATS),
    default="md",
    show_default=True,
    help="Output format. csv is for spreadsheets, one value a cell: config is JSON as --config takes it, and "
    "lists of values are in json and jsonl alone.",
)


class Column(NamedTuple):
    """Of a table: its title, what a record has there, how wide that may be, and whether it stands right."""

    title: str
    text: Callable[[Any], str]
    width: int = 0
    right: bool = False


class Table:
    """A table on standard output whose rows come one by one. Columns are as wide as they say, or as their
    titles or the first row need."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self._columns = columns
        self._layout: Layout | None = None

    def add(self, record: Any) -> None:
        cells = [column.text(record) for column in self._columns]
        if self._layout is None:
            titles = [column.title for column in self._columns]
            known = zip(self._columns, titles, cells, strict=True)
            widths = [max(c.width, cell_width(title), cell_width(text)) for c, title, text in known]
            self._layout = Layout(widths, [column.right for column in self._columns])
            show(self._layout.head(titles))
        show(self._layout.row(cells))


class Records:
    """Records on standard output, as `fmt` has it: md shows `columns`, the others all fields of these
    dataclasses. Used in a `with` block, at whose end json is written, which is one whole."""

    def __init__(self, fmt: str, columns: Sequence[Column]) -> None:
        self._fmt, self._table = fmt, Table(columns)
        self._whole: list[dict[str, Any]] = []
        self._csv_columns: list[str] = []

    def __enter__(self) -> Records:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        if self._fmt == "json" and failed is None:
            show(json.dumps(self._whole, indent=2, allow_nan=False))

    def add(self, record: Any) -> None:
        if self._fmt == "md":
            self._table.add(record)
        elif self._fmt == "json":
            self._whole.append(fields(record))
        elif self._fmt == "jsonl":
            show(json.dumps(fields(record), allow_nan=False))
        else:
            self._add_csv(record)

    def _add_csv(self, record: Any) -> None:
        row = _cells(record)
        if not self._csv_columns:
            self._csv_columns = list(row)
            show(_csv(self._csv_columns))
        show(_csv([row.get(name) for name in self._csv_columns]))


def show(text: str) -> None:
    """A line or more, at once, so that it has been shown whatever becomes of the run."""
    with without_bar():
        click.echo(text)


def k_text(record: Any) -> str:
    """The K of a record of `bench` or `eval`."""
    return "dense" if record.config is None else budget_text(record.top_k, record.top_k_used)


def fields(record: Any) -> dict[str, Any]:
    """Those of a dataclass, as JSON types; names in them can be shown."""
    found: dict[str, Any] = _shown(asdict(record))
    return found


def _shown(value: Any) -> Any:
    if isinstance(value, str):
        return shown_name(value)
    if isinstance(value, dict):
        return {name: _shown(x) for name, x in value.items()}
    return [_shown(x) for x in value] if isinstance(value, (list, tuple)) else value


def _cells(record: Any) -> dict[str, Any]:
    """One value each, and the same names for every record of a kind: what an object holds is in columns of
    its own, but a configuration stays whole; fields that hold lists are left out."""
    row, cells = fields(record), dict[str, Any]()
    for field in fields_of(record):
        name, value = field.name, row[field.name]
        if str(field.type).startswith(("list", "tuple")):
            continue
        if name == "config":
            cells[name] = None if value is None else json.dumps(value, separators=(",", ":"))
        elif isinstance(value, dict):
            cells |= {f"{name}.{part}": x for part, x in value.items()}
        else:
            cells[name] = None if isinstance(value, list) else value
    return cells


def _csv(cells: Sequence[Any]) -> str:
    """A line, without its end."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().removesuffix("\n")


def write_file(path: str, text: str) -> None:
    """UTF-8. Raises OSError that names the path, whatever goes wrong."""
    with naming(path):
        Path(path).write_text(text, encoding="utf-8", errors="replace")
