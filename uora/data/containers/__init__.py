"""Files to records, whatever they are: recognised by their content, never by their name.

| container | records |
|---|---|
| jsonl | a JSON value on each line |
| json | the items of one JSON array |
| csv | the lines below a header, by its names; every cell is a string |
| parquet | rows by the names of their columns |
| zip | images in folders named like their classes, or with a metadata.csv or metadata.jsonl |

All are read piece by piece, so that memory does not grow with the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from uora.data.containers.arrays import read_array
from uora.data.containers.imagefolder import read_images
from uora.data.containers.lines import read_lines
from uora.data.containers.parquet import read_parquet
from uora.data.containers.sniffing import container_of
from uora.data.containers.tables import read_table
from uora.data.formats import Container, Problem, Record

__all__ = ["container_of", "read_records"]


def read_records(path: Path, container: Container) -> Iterator[Record | Problem]:
    """Everything that the file holds, in order, and problems in the place of what cannot be read."""
    match container:
        case "parquet":
            yield from read_parquet(path)
        case "zip":
            yield from read_images(path)
        case _:
            with path.open("rb") as file:
                yield from {"jsonl": read_lines, "json": read_array, "csv": read_table}[container](file)
