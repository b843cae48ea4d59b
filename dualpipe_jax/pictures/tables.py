"""Rows of cells as aligned text, and as an HTML table."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

TableRow = tuple[str, ...]


def aligned(rows: Sequence[TableRow]) -> list[str]:
    """Returns lines of aligned columns: the first to the left, others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def html_table(rows: Sequence[TableRow]) -> str:
    """Returns an HTML table; the first row is its head."""
    head, *body = rows
    lines = ["<tr>" + "".join(f"<th>{escape(c)}</th>" for c in head) + "</tr>"]
    lines += [
        "<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in body
    ]
    return "<table>" + "\n".join(lines) + "</table>"
