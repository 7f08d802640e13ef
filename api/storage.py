"""Where uploaded bytes lie. Keys are chosen by us, never by a client."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Protocol

from api.errors import TooLarge

CHUNK_BYTES = 1024 * 1024
_KEY = re.compile(r"[A-Za-z0-9_-]{1,128}")
_PART = re.compile(r"\.[A-Za-z0-9_-]{1,128}\.[0-9a-f]{16}\.part")


@dataclass(frozen=True)
class StoredObject:
    """What was written."""

    bytes: int
    sha256: str


class Source(Protocol):
    """What bytes are taken from."""

    def read(self, size: int, /) -> bytes:
        """At most ``size`` bytes; none at the end."""


class ObjectStore(Protocol):
    """Objects by key. An object is there whole or not at all."""

    def write(self, key: str, source: Source, *, max_bytes: int) -> StoredObject:
        """Store the rest of ``source``; raises ``TooLarge`` over ``max_bytes``."""

    def open(self, key: str) -> BinaryIO:
        """Open for reading; raises ``FileNotFoundError``."""

    def local_path(self, key: str) -> AbstractContextManager[Path]:
        """A readable file with the content, for as long as the block lasts; raises ``FileNotFoundError``."""

    def delete(self, key: str) -> None:
        """Remove it, if it is there."""

    def old_keys(self, before: datetime) -> Iterator[str]:
        """Keys of the objects that were written before then."""

    def remove_torn(self, before: datetime) -> int:
        """Remove what writers that died before then left half-written; returns how much there was."""


class LocalStore:
    """``ObjectStore`` in one folder; trainers on other machines must mount it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, key: str, source: Source, *, max_bytes: int) -> StoredObject:
        """Copy to a hidden file beside the target, then rename: a reader never sees half an object.

        Raises:
            TooLarge: ``source`` has more than ``max_bytes``; nothing is left behind.
        """
        target = self._path(key)
        part = target.with_name(f".{key}.{secrets.token_hex(8)}.part")
        try:
            stored = _copy(source, part, max_bytes=max_bytes)
            part.replace(target)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        return stored

    def open(self, key: str) -> BinaryIO:
        """Open for reading."""
        return self._path(key).open("rb")

    @contextmanager
    def local_path(self, key: str) -> Iterator[Path]:
        """The file itself."""
        path = self._path(key)
        if not path.is_file():
            raise FileNotFoundError(f"no stored object {key!r}; the upload was deleted or lies in another store")
        yield path

    def delete(self, key: str) -> None:
        """Remove it, if it is there."""
        with suppress(FileNotFoundError):
            self._path(key).unlink()

    def old_keys(self, before: datetime) -> Iterator[str]:
        """Keys of the objects that were written before then."""
        for path in self._older(before):
            if _KEY.fullmatch(path.name):
                yield path.name

    def remove_torn(self, before: datetime) -> int:
        """Remove the hidden files of writers that died before then; returns how many there were."""
        torn = [path for path in self._older(before) if _PART.fullmatch(path.name)]
        for path in torn:
            path.unlink(missing_ok=True)
        return len(torn)

    def _older(self, before: datetime) -> Iterator[Path]:
        for entry in os.scandir(self._folder):
            with suppress(FileNotFoundError):
                if entry.is_file() and entry.stat().st_mtime < before.timestamp():
                    yield Path(entry)

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"not a storage key: {key!r}; expected letters, digits, '_' and '-' only")
        return self._folder / key


def _copy(source: Source, part: Path, *, max_bytes: int) -> StoredObject:
    digest = hashlib.sha256()
    written = 0
    with part.open("xb") as target:
        while chunk := source.read(CHUNK_BYTES):
            written += len(chunk)
            if written > max_bytes:
                raise TooLarge(f"The file has more than {max_bytes} bytes; split it.", param="file")
            digest.update(chunk)
            target.write(chunk)
        target.flush()
        os.fsync(target.fileno())  # the row that names the object must not outlive its bytes
    return StoredObject(bytes=written, sha256=digest.hexdigest())
