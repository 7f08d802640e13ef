"""The object store: whole objects or none."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.errors import TooLarge
from api.storage import CHUNK_BYTES, LocalStore


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "objects")


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1])
def test_an_object_comes_back(store: LocalStore, size: int) -> None:
    content = b"\x00\xff" * (size // 2) + b"x" * (size % 2)
    stored = store.write("key", io.BytesIO(content), max_bytes=size)
    assert (stored.bytes, stored.sha256) == (size, hashlib.sha256(content).hexdigest())
    with store.open("key") as source:
        assert source.read() == content
    with store.local_path("key") as path:
        assert path.read_bytes() == content


class Breaking(io.BytesIO):
    """A source that breaks after its first chunk."""

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() > 0:
            raise ConnectionResetError
        return super().read(size)


@pytest.mark.parametrize(
    ("source", "error"),
    [(io.BytesIO(b"x" * 11), TooLarge), (Breaking(b"x" * 10), ConnectionResetError)],
)
def test_a_failed_write_leaves_what_was_there(
    store: LocalStore, tmp_path: Path, source: Any, error: type[Exception]
) -> None:
    store.write("old", io.BytesIO(b"before"), max_bytes=10)
    for key in ("old", "new"):
        source.seek(0)
        with pytest.raises(error):
            store.write(key, source, max_bytes=10)
    assert [path.name for path in (tmp_path / "objects").iterdir()] == ["old"]
    with store.open("old") as kept:
        assert kept.read() == b"before"


def test_what_is_not_there(store: LocalStore) -> None:
    with pytest.raises(FileNotFoundError):
        store.open("none")
    with pytest.raises(FileNotFoundError), store.local_path("none"):
        pass
    store.delete("none")
    store.write("key", io.BytesIO(b"x"), max_bytes=1)
    store.delete("key")
    with pytest.raises(FileNotFoundError):
        store.open("key")


@given(key=st.text(max_size=20))
def test_no_key_leaves_the_folder(tmp_path_factory: pytest.TempPathFactory, key: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "fence" / "objects"
    store = LocalStore(folder)
    try:
        store.write(key, io.BytesIO(b"x"), max_bytes=1)
    except ValueError:
        return
    assert (folder / key).parent == folder
    assert [path.name for path in folder.parent.iterdir()] == ["objects"]
    store.delete(key)
