"""Records to standard output, as a table or as data, and files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import click

from ..engines.naming import naming
from ..engines.text import shown_name
from ..report.tables import budget_text, markdown_table

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

Column = tuple[str, Callable[[Any], str]]


def write_records(records: Sequence[Any], fmt: str, columns: Sequence[Column]) -> None:
    """`records` are dataclasses. md shows `columns` (title, text of a record), the others the fields."""
    if fmt == "md":
        write_table(records, columns)
        return
    rows = [fields(record) for record in records]
    if fmt == "json":
        click.echo(json.dumps(rows, indent=2, allow_nan=False))
    elif fmt == "jsonl":
        for row in rows:
            click.echo(json.dumps(row, allow_nan=False))
    elif rows:
        click.echo(_csv([_cells(row) for row in rows]), nl=False)


def write_table(records: Sequence[Any], columns: Sequence[Column]) -> None:
    click.echo(
        markdown_table([title for title, _ in columns], [[text(r) for _, text in columns] for r in records])
    )


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


def _cells(row: dict[str, Any]) -> dict[str, Any]:
    """One value each: what an object holds is in columns of its own, but a configuration stays whole."""
    cells: dict[str, Any] = {}
    for name, value in row.items():
        if name == "config":
            cells[name] = None if value is None else json.dumps(value, separators=(",", ":"))
        elif isinstance(value, dict):
            cells |= {f"{name}.{part}": x for part, x in value.items()}
        else:
            cells[name] = value
    return {name: value for name, value in cells.items() if not isinstance(value, list)}


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    """With every column that some row has."""
    text = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_file(path: str, text: str) -> None:
    """UTF-8. Raises OSError that names the path, whatever goes wrong."""
    with naming(path):
        Path(path).write_text(text, encoding="utf-8", errors="replace")
