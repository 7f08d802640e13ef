"""Zips of images: Hugging Face's conventions, and what a zip can do to whoever opens it."""

from __future__ import annotations

import io
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.uora.data.files import png, write_zip
from uora.data import ImageRow, Problem, read_file, scan_file
from uora.data.containers import imagefolder
from uora.data.formats import place
from uora.errors import DataError

A, B = png(0), png(255)


def problems(path: Path) -> list[tuple[str | None, str]]:
    return [
        (place(found), found.code) for found in scan_file(path, "image-classification") if isinstance(found, Problem)
    ]


def test_folders_are_classes(tmp_path: Path) -> None:
    members = {
        "pets/": b"",
        "pets/cat/1.png": A,
        "pets/dog/1.PNG": B,
        "__MACOSX/pets/cat/._1.png": b"x",
        "pets/.DS_Store": b"x",
        "pets/dog/Thumbs.db": b"x",
    }
    path = write_zip(tmp_path / "upload", members)
    rows = read_file(path, "image-classification").rows
    assert rows == (ImageRow(A, "cat", 1), ImageRow(B, "dog", 2))
    assert [row.location for row in rows] == ["File pets/cat/1.png", "File pets/dog/1.PNG"]


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("metadata.csv", b"file_name,label\nx/2.png,dog\n1.png,cat\n"),
        ("metadata.jsonl", b'{"file_name": "x/2.png", "label": "dog"}\n{"file_name": "1.png", "label": "cat"}\n'),
    ],
)
@pytest.mark.parametrize("folder", ["", "data/"])
def test_metadata_names_the_classes(tmp_path: Path, name: str, table: bytes, folder: str) -> None:
    members = {f"{folder}1.png": A, f"{folder}{name}": table, f"{folder}x/2.png": B}
    rows = read_file(write_zip(tmp_path / "upload", members), "image-classification").rows
    assert rows == (ImageRow(B, "dog", 1), ImageRow(A, "cat", 2))


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({}, [(None, "empty_file")]),
        ({"1.png": A}, [("File 1.png", "missing_label")]),
        ({"cat/readme.txt": b"hello"}, [("File cat/readme.txt", "invalid_image")]),
        ({"train/cat/1.png": A, "test/cat/1.png": B}, [(None, "several_splits")]),
        (
            {"metadata.csv": b"file_name,label\n1.png,cat\n3.png,dog\n1.png,cat\n", "1.png": A, "2.png": B},
            [
                ("File metadata.csv, line 3", "invalid_file_name"),
                ("File metadata.csv, line 4", "invalid_file_name"),
                ("File 2.png", "missing_label"),
            ],
        ),
        (
            {"metadata.jsonl": b'3\n{"file_name": ["1.png"], "label": "x"}\n{', "1.png": A},
            [
                ("File metadata.jsonl, line 1", "invalid_row"),
                ("File metadata.jsonl, line 2", "invalid_file_name"),
                ("File metadata.jsonl, line 3", "invalid_json"),
                ("File 1.png", "missing_label"),
            ],
        ),
        (
            {"metadata.csv": b"file_name,label,image\n1.png,cat,x\n", "1.png": A},
            [("File metadata.csv, line 2", "unknown_key"), ("File 1.png", "missing_label")],
        ),
        ({"metadata.csv": b"file_name,label\n1.png,\n", "1.png": A}, [("File 1.png", "invalid_content")]),
        ({"metadata.csv": b"file_name\n1.png\n", "1.png": A}, [("File 1.png", "missing_field")]),
        ({"metadata.csv": b"file_name,label,size\n1.png,a,3\n", "1.png": A}, [("File 1.png", "unknown_key")]),
        ({"metadata.csv": b"", "a/metadata.csv": b"", "1.png": A}, [("File a/metadata.csv", "invalid_metadata")]),
        ({"../cat/1.png": A}, [("File ../cat/1.png", "unsafe_name")]),
        ({"/cat/1.png": A}, [("File /cat/1.png", "unsafe_name")]),
        ({"cat\\..\\1.png": A}, [("File cat\\..\\1.png", "unsafe_name")]),
        ({"C:/cat/1.png": A}, [("File C:/cat/1.png", "unsafe_name")]),
        ({"cat/\x1b[31m.png": b""}, [("File 'cat/\\x1b[31m.png'", "invalid_image")]),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, members: dict[str, bytes], expected: list[tuple[str | None, str]]
) -> None:
    assert problems(write_zip(tmp_path / "upload", members)) == expected


def test_a_name_that_is_there_twice(tmp_path: Path) -> None:
    path = tmp_path / "upload"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cat/1.png", A)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("cat/1.png", B)
    assert problems(path) == [("File cat/1.png", "duplicate_name")]


def test_encrypted_files_are_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "upload", {"cat/1.png": A, "dog/1.png": B})
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 8] |= 1  # the first of the flags, in the list of files
    path.write_bytes(content)
    assert problems(path) == [("File cat/1.png", "encrypted_file")]


@pytest.mark.parametrize(
    ("limit", "value", "location"),
    [
        ("MAX_FILES", 1, None),
        ("MAX_TOTAL_BYTES", 1999, None),
        ("MAX_DIRECTORY_BYTES", 60, None),
        ("MAX_FILE_BYTES", 999, "File cat/1.png"),
    ],
)
def test_a_bomb_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int, location: str | None
) -> None:
    path = write_zip(tmp_path / "upload", {"cat/1.png": A.ljust(1000, b"\0"), "dog/1.png": B.ljust(1000, b"\0")})
    assert not problems(path)
    monkeypatch.setattr(imagefolder, limit, value)
    assert problems(path)[0] == (location, "too_large")


@pytest.mark.parametrize("comment", [b"", b"a zip"])
def test_a_list_of_files_that_is_larger_than_it_says_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comment: bytes
) -> None:
    """In the zip's larger variant a second record overrules the one at the end."""
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    path = tmp_path / "upload"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cat/1.png", A)
        archive.writestr("dog/1.png", B)
        archive.comment = comment
    content = bytearray(path.read_bytes())
    end = content.index(b"PK\x05\x06")
    content[end + 12 : end + 16] = bytes(4)
    path.write_bytes(content)
    assert not problems(path)
    monkeypatch.setattr(imagefolder, "MAX_DIRECTORY_BYTES", 60)
    assert problems(path) == [(None, "too_large")]


def test_a_bomb_that_declares_less_than_it_has(tmp_path: Path) -> None:
    """The declared size is what counts: no more than that is ever unpacked."""
    path = write_zip(tmp_path / "upload", {"cat/1.png": A.ljust(100_000, b"\0")})
    path.write_bytes(path.read_bytes().replace((100_000).to_bytes(4, "little"), (100).to_bytes(4, "little")))
    assert problems(path) == [("File cat/1.png", "invalid_zip")]


def test_a_file_without_a_name_is_passed_over(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "upload", {"qq": b"x", "cat/1.png": A, "dog/1.png": B})
    path.write_bytes(path.read_bytes().replace(b"qq", b"\0q"))
    assert not problems(path)


def test_one_damaged_file_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "upload"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cat/1.png", A)
        archive.writestr("dog/1.png", B)
    path.write_bytes(path.read_bytes().replace(A, A[:-1] + b"\0"))
    found = list(scan_file(path, "image-classification"))
    assert isinstance(found[0], Problem)
    assert (found[0].code, place(found[0])) == ("invalid_zip", "File cat/1.png")
    assert found[1] == ImageRow(B, "dog", 2)


ZIP = io.BytesIO()
with zipfile.ZipFile(ZIP, "w") as made:
    made.writestr("metadata.csv", "file_name,label\n1.png,cat\n")
    made.writestr("1.png", A)


@given(at=st.integers(0, len(ZIP.getvalue()) - 1), content=st.binary(min_size=1, max_size=4))
def test_any_damage_is_judged(tmp_path_factory: pytest.TempPathFactory, at: int, content: bytes) -> None:
    path = tmp_path_factory.mktemp("zips") / "upload"
    whole = ZIP.getvalue()
    path.write_bytes(whole[:at] + content + whole[at + len(content) :])
    with suppress(DataError):
        read_file(path, "image-classification")
