"""A report on a data set, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from uora.data.report import DatasetReport, Estimate, Lengths, Preview

_BAR_CELLS = 40


def render_report(report: DatasetReport) -> RenderableType:
    """Counts, lengths, classes, problems and the first rows; what is learned is bold, what is not is dim."""
    return Group(*_parts(report))


def _parts(report: DatasetReport) -> Iterator[RenderableType]:
    yield _counts(report)
    if report.lengths:
        yield _histogram(report.lengths)
    if report.labels:
        yield _labels(report)
    if report.problems:
        yield _problems(report)
    for preview in report.previews:
        # Runs of tokens are one text; a text and its class are two.
        yield _preview(preview, separator="" if report.learned_tokens else "\n")


def _counts(report: DatasetReport) -> Table:
    table = Table(box=box.SIMPLE, show_header=False)
    for name, value in _facts(report):
        table.add_row(name, _text(value))
    return table


def _facts(report: DatasetReport) -> Iterator[tuple[str, str]]:
    yield "file", f"{report.container or 'not recognised'}, rows: {report.row_format or 'not recognised'}"
    yield "task", report.task or "not recognised"
    yield "rows", f"{report.rows_read:,} read, {report.rows_usable:,} usable"
    if report.rows_truncated or report.rows_dropped:
        yield "too long", f"{report.rows_truncated:,} cut, {report.rows_dropped:,} left out"
    yield "tokens", f"{report.tokens:,}, learned: {report.learned_tokens:,}"
    if report.duplicates.count:
        yield (
            "duplicates",
            f"{report.duplicates.count:,}: {_some(report.duplicates.locations, report.duplicates.count)}",
        )
    if report.leak is not None:
        yield "also in training", f"{report.leak:,} rows"
    if report.numbers:
        yield "labels", f"{report.numbers.min:g} to {report.numbers.max:g}, mean {report.numbers.mean:g}"
    if report.estimate is not None and report.estimate.seconds is not None:
        yield "estimate", _estimate(report.estimate)
        if report.estimate.cost:
            yield "cost", f"{report.estimate.cost:,.2f}"
    yield "trainable", "yes" if report.trainable else "no"


def _estimate(found: Estimate) -> str:
    minutes, mebibytes = (found.seconds or 0) / 60, (found.memory_bytes or 0) / 2**20
    return (
        f"{found.tokens:,} tokens in {minutes:,.1f} minutes, {mebibytes:,.0f} MiB beside the base model; on another "
        f"machine than {found.machine} the minutes differ"
    )


def _some(shown: tuple[str, ...], count: int) -> str:
    return ", ".join(shown) + (", ..." if count > len(shown) else "")


def _histogram(lengths: Lengths) -> Table:
    title = f"tokens of a row: median {lengths.p50:,}, 95 % up to {lengths.p95:,}, longest {lengths.max:,}"
    table = Table("tokens", "rows", "", title=title, box=box.SIMPLE, title_justify="left")
    for (low, high), rows in zip(pairwise(lengths.edges), lengths.counts, strict=True):
        table.add_row(f"{low:,} - {high - 1:,}", f"{rows:,}", _bar(rows, max(lengths.counts)))
    return table


def _bar(rows: int, most: int) -> str:
    return "█" * round(_BAR_CELLS * rows / most) or ("▏" if rows else "")


def _labels(report: DatasetReport) -> Table:
    labels = report.labels or {}
    table = Table("class", "rows", title=f"{report.label_count:,} classes", box=box.SIMPLE, title_justify="left")
    for name, rows in labels.items():
        table.add_row(_text(name), f"{rows:,}")
    return table


def _problems(report: DatasetReport) -> Table:
    first = "" if report.problem_count == len(report.problems) else f", the first {len(report.problems)}"
    title = f"{report.problem_count:,} problems{first}"
    table = Table("where", "code", "what", title=title, box=box.SIMPLE, title_justify="left")
    for problem in report.problems:
        table.add_row(_text(problem.location or "file"), problem.code, _text(problem.message))
    return table


def _preview(preview: Preview, *, separator: str) -> Text:
    pieces = [_text(segment.text, "bold" if segment.learned else "dim") for segment in preview.segments]
    text = _text(f"{preview.location}, what is learned in bold:\n").append_text(Text(separator).join(pieces))
    if preview.hidden_tokens:
        text.append(f"\n... and {preview.hidden_tokens:,} more tokens", style="italic")
    return text


def _text(content: str, style: str = "") -> Text:
    """Text of a user's file: neither rich's markup nor a terminal's commands have a meaning in it."""
    return Text(content.replace("\x1b", "␛"), style)
