"""What commands print: tables and lines for people, JSON for programs."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli.errors import CliError

if TYPE_CHECKING:
    from openai import BaseModel

Json = dict[str, Any]
#: A column's cell, of an item.
Cell = Callable[[Json], Any]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Limit = Annotated[int, typer.Option(min=1, help="How many at most.")]
Out = Annotated[Path | None, typer.Option(help="The new file; its own name in this folder if left out.")]

#: Where nobody looks at the width, no line is broken: a cut id is of no use to a program.
_PIPE_WIDTH = 10_000
_CONTROLS = {code: None for code in (*range(32), 127, *range(0x80, 0xA0)) if chr(code) not in "\n\t"}


def console(*, stderr: bool = False) -> Console:
    """A console that takes texts as they are."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPE_WIDTH
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False, width=width)


def say(text: str) -> None:
    """A line about what is going on, which is no result."""
    console(stderr=True).print(text, style="dim", soft_wrap=True)


def complain(text: str) -> None:
    """The line of an error."""
    console(stderr=True).print(Text.assemble(("Error: ", "bold red"), printable(text)), soft_wrap=True)


def printable(text: str) -> str:
    """The text without what would steer the terminal: models say anything."""
    return text.translate(_CONTROLS)


def as_dict(item: BaseModel) -> Json:
    """All that the service said of an object, keys that OpenAI does not have included."""
    return item.to_dict(mode="json")


def as_dicts(items: Iterable[BaseModel], limit: int) -> list[Json]:
    """The first ``limit`` of a list, whose next pages are asked for as they are needed."""
    return [as_dict(item) for item in islice(items, limit)]


def print_json(value: Any) -> None:
    """Indented, and as it is: no colours, no breaks."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_list(items: Sequence[Json], columns: Mapping[str, Cell], *, as_json: bool) -> None:
    """A table with a row for each item, or a JSON array of the whole items."""
    if as_json:
        print_json(items)
        return
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[:1]:
        column.no_wrap = True  # the id, to be copied
        column.overflow = "fold"
    for item in items:
        table.add_row(*(printable(_text(cell(item))) for cell in columns.values()))
    console().print(table if items else "There are none.")


def print_item(item: Json, *, as_json: bool) -> None:
    """All keys of one object, those without a value left out."""
    if as_json:
        print_json(item)
        return
    grid = Table.grid(padding=(0, 2))
    for name, value in item.items():
        if name != "object" and value not in (None, [], {}):
            grid.add_row(Text(name, style="bold"), printable(_text(when(value) if name.endswith("_at") else value)))
    console().print(grid)


def when(seconds: Any) -> str:
    """A time of the service as the user's clock shows it."""
    if not isinstance(seconds, int):
        return ""
    return datetime.fromtimestamp(seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def size(count: Any) -> str:
    """``12,345``"""
    return f"{count:,}" if isinstance(count, int) else ""


def write_new(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file that is there as a whole or not at all.

    Raises:
        CliError: there is one already.
    """
    if path.exists():
        raise CliError(f"{path} is there already; choose another name with --out.")
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
        os.chmod(temporary, 0o666 & ~_umask())  # as any new file; mkstemp's are private
        Path(temporary).replace(path)
    except BaseException:
        with suppress(FileNotFoundError):
            Path(temporary).unlink()
        raise
    say(f"{path}: {path.stat().st_size:,} bytes")


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
