"""Markdown tables, and numbers in them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..engines.text import shown_name


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that reads well as plain text too: columns padded to equal width, numbers to the right. A bar
    or the end of a line in a name is none of the table."""
    titles, rows = [_cell(title) for title in titles], [[_cell(text) for text in row] for row in rows]
    widths = [max(2, *(len(row[i]) for row in [titles, *rows])) for i in range(len(titles))]
    right = [all(_is_number(row[i]) for row in rows) for i in range(len(titles))]

    def line(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * (w - 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)]
    return "\n".join([line(titles), line(rule), *map(line, rows)])


def _cell(text: str) -> str:
    """Shown as it is, but for bars, with the backslashes before them, and characters that have no shape."""
    barred = re.sub(r"(\\*)\|", r"\1\1\|", shown_name(text))
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in barred)


def _is_number(text: str) -> bool:
    return text[:1].isdigit() or text in ("", "-")


def budget_text(top_k: int | str, used: int | list[int] | None) -> str:
    """K with what "auto" was, where the record says it."""
    return f"auto ({used})" if top_k == "auto" and used is not None else str(top_k)


def with_error(value: float, error: float | None) -> str:
    """`0.0123 ± 0.0004`; without an error the value alone."""
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def milliseconds(ms: float) -> str:
    """Two decimals; below 1 ms four."""
    return f"{ms:.2f}" if ms >= 1 else f"{ms:.4f}"


def with_quartiles(middle: float, low: float, high: float) -> str:
    """A ratio: its median and, behind it, its quartiles."""
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"
