"""Files of a few short rows in the shape of the real ones, for the short form of the study."""

from __future__ import annotations

import gzip
import json
import struct
import zipfile
from pathlib import Path

from benchmarks.study.data import FASHION_CLASSES, Places

#: Rows of each training file; as many as a run takes and the tuning holds out.
ROWS = 16
_WORDS = ("pear", "plum", "fig", "saw", "axe")


def write(folder: Path) -> Places:
    """All of them below ``folder``."""
    for name, (header, line) in _GLUE.items():
        for part in ("train", "dev"):
            _text(folder / "data" / "glue" / name / f"{part}.tsv", header, [line(i) for i in range(ROWS)])
    mr = [f'"name[{_word(i)}], food[{_word(i // 5)}]","{_word(i)} has {_word(i // 5)}"' for i in range(ROWS)]
    for file in ("devset.csv", "testset_w_refs.csv"):
        _text(folder / "data" / "e2e" / file, "mr,ref", mr)
    _chitchat(folder / "chitchat.zip")
    for part in ("train", "t10k"):
        _fashion(folder / "fashion", part)
    return Places(folder / "data", folder / "cache", folder / "fashion", folder / "chitchat.zip")


def _word(i: int) -> str:
    return _WORDS[i % len(_WORDS)]


_GLUE = {
    "SST-2": ("sentence\tlabel", lambda i: f"{_word(i)} {_word(i + 1)}\t{i % 2}"),
    "CoLA": (None, lambda i: f"gj\t{i % 2}\t\t{_word(i)}"),
    "MRPC": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        lambda i: f'{i % 2}\t1\t2\t"{_word(i)}\t{_word(2 * i)}',
    ),
    "RTE": (
        "index\tsentence1\tsentence2\tlabel",
        lambda i: f"{i}\t{_word(i)}\t{_word(3 * i)}\t{'not_' * (i % 2)}entailment",
    ),
    "STS-B": (
        "\t".join(["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2"])
        + "\tscore",
        lambda i: "\t".join([str(i), *["none"] * 6, _word(i), _word(2 * i), f"{i % 6}.000"]),
    ),
}


def _text(path: Path, header: str | None, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in ([header] if header else []) + lines), encoding="utf-8")


def _chitchat(path: Path) -> None:
    said = {str(i): {"messages": [[{"text": _word(i + j)}] for j in range(4)]} for i in range(10 * ROWS)}
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("chitchat_dataset/dataset.json", json.dumps(said))


def _fashion(folder: Path, part: str) -> None:
    folder.mkdir(exist_ok=True)
    labels = bytes(i % len(FASHION_CLASSES) for i in range(2 * ROWS))
    pixels = bytes(25 * label + j % 7 for label in labels for j in range(28 * 28))
    header = struct.pack(">4i", 2051, len(labels), 28, 28)
    (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pixels))
    (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(struct.pack(">2i", 2049, len(labels)) + labels))
