"""Rows of the E2E NLG challenge (CC BY-SA 4.0, Dušek et al. 2020) as training rows."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Literal

#: Where ``devset.csv`` (columns mr, ref) lies if not said otherwise.
DEFAULT = Path(__file__).resolve().parents[2] / "shared" / "data" / "e2e" / "devset.csv"


Format = Literal["chat", "completion"]


def read_rows(path: Path, count: int, *, as_: Format = "chat") -> list[dict[str, object]]:
    """``count`` rows, spread evenly over the file, which is sorted: a meaning to say, and a text that says it."""
    if not path.is_file():
        sys.exit(f"{path} is not there. It is the E2E challenge's devset.csv; give its place with --data.")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if count > len(rows):
        sys.exit(f"{path} has {len(rows)} rows, and {count} are needed; take fewer steps.")
    chosen = rows[:: len(rows) // count][:count]
    if as_ == "completion":
        return [{"prompt": row["mr"] + "\n", "completion": row["ref"]} for row in chosen]
    return [
        {"messages": [{"role": "user", "content": row["mr"]}, {"role": "assistant", "content": row["ref"]}]}
        for row in chosen
    ]


def write_jsonl(rows: list[dict[str, object]], path: Path) -> Path:
    """A training file of the rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
