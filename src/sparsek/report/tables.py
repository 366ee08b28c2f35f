"""Markdown tables, and numbers in them."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that reads well as plain text too: columns padded to equal width, numbers to the right."""
    widths = [max(2, *(len(row[i]) for row in [titles, *rows])) for i in range(len(titles))]
    right = [all(_is_number(row[i]) for row in rows) for i in range(len(titles))]

    def line(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * (w - 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)]
    return "\n".join([line(titles), line(rule), *map(line, rows)])


def _is_number(text: str) -> bool:
    return text[:1].isdigit() or text in ("", "-")


def with_error(value: float, error: float | None) -> str:
    """`0.0123 ± 0.0004`; without an error the value alone."""
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def milliseconds(ms: float) -> str:
    """Two decimals; below 1 ms four."""
    return f"{ms:.2f}" if ms >= 1 else f"{ms:.4f}"
