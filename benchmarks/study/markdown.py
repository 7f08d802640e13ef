"""Numbers and tables as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

NOTHING = "-"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> str:
    """A table whose first ``words`` columns are text, and the others numbers."""
    rule = ["---" if column < words else "---:" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def number(value: float | None, digits: int = 0) -> str:
    """With commas; nothing for None."""
    return NOTHING if value is None else f"{value:,.{digits}f}"


def rate(value: float) -> str:
    """A learning rate."""
    return f"{value:g}"


def points(value: float, digits: int = 1) -> str:
    """A difference with its sign; what rounds to nothing has none."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text


def ratio(larger: float, smaller: float) -> str:
    """How many times."""
    return f"{larger / smaller:.1f}"


def paragraphs(*parts: str) -> str:
    """Those that there are, with an empty line between them."""
    return "\n\n".join(part for part in parts if part) + "\n"
