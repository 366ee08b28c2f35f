"""Markdown tables, and numbers in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..engines.text import shown_name


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that reads well as plain text too: columns padded to equal width, numbers to the right."""
    columns = range(len(titles))
    widths = [max(cell_width(row[i]) for row in [titles, *rows]) for i in columns]
    layout = Layout(widths, [all(_is_number(row[i]) for row in rows) for i in columns])
    return "\n".join([layout.head(titles), *map(layout.row, rows)])


@dataclass(frozen=True)
class Layout:
    """A table whose rows come one by one. A longer cell than the width of its column is still a cell; a bar
    or the end of a line in a name is none of the table.

    Attributes:
        widths: of the columns, in characters. right: which of them stand to the right.
    """

    widths: Sequence[int]
    right: Sequence[bool]

    def head(self, titles: Sequence[str]) -> str:
        """The titles, and the line under them."""
        rule = ["-" * (max(2, w) - 1) + (":" if r else "-") for w, r in self._columns()]
        return f"{self.row(titles)}\n{self.row(rule)}"

    def row(self, cells: Sequence[str]) -> str:
        texts = zip(map(_cell, cells), self._columns(), strict=True)
        padded = (text.rjust(max(2, w)) if r else text.ljust(max(2, w)) for text, (w, r) in texts)
        return "| " + " | ".join(padded) + " |"

    def _columns(self) -> list[tuple[int, bool]]:
        return list(zip(self.widths, self.right, strict=True))


def cell_width(text: str) -> int:
    """Of a cell, as it is shown."""
    return len(_cell(text))


def _cell(text: str) -> str:
    """Shown as it is, but for bars, with the backslashes before them, and characters that have no shape."""
    barred = re.sub(r"(\\*)\|", r"\1\1\|", shown_name(text))
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in barred)


def _is_number(text: str) -> bool:
    return text[:1].isdigit() or text in ("", "-")


def budget_text(top_k: int | str, used: int | list[int] | None) -> str:
    """K with what "auto" was, where the record says it."""
    return f"auto ({used})" if top_k == "auto" and used is not None else str(top_k)


def rule_text(top_k: int, min_share: float, num_keys: int) -> str:
    """Which of so many keys one call keeps: a count, a share, or both."""
    if not min_share:
        return "all" if top_k >= num_keys else str(top_k)
    share = f"share {min_share:g}"
    return share if top_k >= num_keys else f"{share}, K {top_k}"


def with_error(value: float, error: float | None) -> str:
    """`0.0123 ± 0.0004`; without an error the value alone."""
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def milliseconds(ms: float) -> str:
    """Two decimals; below 1 ms four."""
    return f"{ms:.2f}" if ms >= 1 else f"{ms:.4f}"


def with_quartiles(middle: float, low: float, high: float) -> str:
    """A ratio: its median and, behind it, its quartiles."""
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"
