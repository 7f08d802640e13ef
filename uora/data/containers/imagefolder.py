"""A zip of images to records, by the conventions of Hugging Face's imagefolder.

An image's class is the folder that it is in, unless the zip has a ``metadata.csv`` or ``metadata.jsonl``, whose rows
give a ``file_name`` (below the metadata's folder) and a ``label``. Nothing is ever unpacked to disk.
"""

from __future__ import annotations

import io
import lzma
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from zipfile import ZipFile, ZipInfo

from uora.data.containers.lines import read_lines
from uora.data.containers.tables import read_table
from uora.data.formats import Problem, Record
from uora.data.values import kind, shown
from uora.errors import DataError

MAX_FILES = 100_000
#: Of one file, unpacked.
MAX_FILE_BYTES = 64 << 20
#: Of all files, unpacked.
MAX_TOTAL_BYTES = 4 << 30
#: Of the list of files at the zip's end, which is read as a whole.
MAX_DIRECTORY_BYTES = 32 << 20

_END, _LOCATOR = b"PK\x05\x06", b"PK\x06\x07"
_END_BYTES, _END64_BYTES, _LOCATOR_BYTES, _MAX_COMMENT_BYTES = 22, 56, 20, 0xFFFF
_ENCRYPTED = 0x1
_METADATA = {"metadata.jsonl": read_lines, "metadata.csv": read_table}
_SPLITS = {"train", "validation", "valid", "val", "dev", "test", "eval"}
#: What the libraries behind `zipfile` raise for damaged members.
_DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, NotImplementedError, RuntimeError)


def read_images(path: Path) -> Iterator[Record | Problem]:
    """The images with their labels, and problems in the place of files that are none.

    A record is ``{"image": bytes, "label": ...}``, with whatever else the metadata says of it. Folders, hidden files
    and those of macOS are passed over.
    """
    try:
        _check_directory(path)
        with ZipFile(path) as archive:
            yield from _read(archive)
    except DataError as error:
        yield Problem(error.code, error.message)
    except _DAMAGE as error:
        yield Problem("invalid_zip", f"the zip cannot be read: {error}. Make it again.")


def _check_directory(path: Path) -> None:
    """Make sure that the list of files is small before `zipfile` reads it."""
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - _LOCATOR_BYTES - _END64_BYTES - _END_BYTES - _MAX_COMMENT_BYTES))
        declared = _directory_bytes(file.read())
    if min(declared, size) > MAX_DIRECTORY_BYTES:
        raise _too_large(f"a list of files of {declared:,} bytes", f"{MAX_DIRECTORY_BYTES:,}")


def _directory_bytes(tail: bytes) -> int:
    """The size of the list of files where `zipfile` finds it: in the record at the end, or its larger sibling's."""
    end = tail.rfind(_END, 0, len(tail) - _END_BYTES + len(_END))
    if end < 0:
        return 0
    locator = end - _LOCATOR_BYTES
    if locator >= _END64_BYTES and tail[locator:end].startswith(_LOCATOR):
        return int.from_bytes(tail[locator - 16 : locator - 8], "little")
    return int.from_bytes(tail[end + 12 : end + 16], "little")


def _read(archive: ZipFile) -> Iterator[Record | Problem]:
    members = [member for member in archive.infolist() if not _is_passed_over(member)]
    _check_size(members)
    problems = list(_name_problems(members))
    if problems:
        yield from problems
        return
    tables = [member for member in members if _path(member).name in _METADATA]
    images = [member for member in members if _path(member).name not in _METADATA]
    match tables:
        case []:
            yield from _by_folder(archive, images)
        case [table]:
            yield from _by_metadata(archive, table, images)
        case [_, second, *_]:
            yield _problem(second, "invalid_metadata", "the zip has more than one metadata file; expected one.")


def _is_passed_over(member: ZipInfo) -> bool:
    path = _path(member)
    nameless = not path.name  # which `is_dir` does not expect
    return nameless or member.is_dir() or "__MACOSX" in path.parts or path.name.startswith((".", "Thumbs.db"))


def _path(member: ZipInfo) -> PurePosixPath:
    return PurePosixPath(member.filename)


def _check_size(members: list[ZipInfo]) -> None:
    if len(members) > MAX_FILES:
        raise _too_large(f"{len(members):,} files", f"{MAX_FILES:,}")
    total = sum(member.file_size for member in members)
    if total > MAX_TOTAL_BYTES:
        raise _too_large(f"{total:,} bytes once unpacked", f"{MAX_TOTAL_BYTES:,}")


def _too_large(found: str, limit: str) -> DataError:
    return DataError(f"the zip has {found}; at most {limit} are taken. Take fewer or smaller images.", code="too_large")


def _name_problems(members: list[ZipInfo]) -> Iterator[Problem]:
    seen: set[str] = set()
    for member in members:
        name = member.filename
        if name.startswith("/") or "\\" in name or ":" in name.partition("/")[0] or ".." in _path(member).parts:
            yield _problem(member, "unsafe_name", "the name leads out of the zip. Zip the folder itself, by its name.")
        if name in seen:
            yield _problem(member, "duplicate_name", "the zip has this name twice. Give each file a name of its own.")
        seen.add(name)


def _by_folder(archive: ZipFile, images: list[ZipInfo]) -> Iterator[Record | Problem]:
    splits = {part for image in images for part in _path(image).parts[:-2] if part.lower() in _SPLITS}
    if len(splits) > 1:
        message = f"the zip has folders {' and '.join(sorted(splits))}. Make a zip of each; one is a training file."
        yield Problem("several_splits", message)
        return
    for number, image in enumerate(images, start=1):
        label = _path(image).parent.name
        if label:
            yield _image(archive, image, number, {"label": label})
        else:
            message = "the image is in no folder; expected one named like its class, or a metadata.csv."
            yield _problem(image, "missing_label", message, number)


@dataclass(frozen=True)
class _Described:
    """What a row of the metadata says of the image that it names."""

    image: ZipInfo
    values: dict[str, object]


def _by_metadata(archive: ZipFile, table: ZipInfo, images: list[ZipInfo]) -> Iterator[Record | Problem]:
    folder = _path(table).parent
    unnamed = {image.filename: image for image in images}
    number = 0
    for record in _metadata_rows(archive, table):
        found = record if isinstance(record, Problem) else _described(record, folder, unnamed)
        if isinstance(found, Problem):
            yield Problem(found.code, found.message, found.line, f"File {table.filename}, line {found.line}")
        else:
            number += 1
            del unnamed[found.image.filename]
            yield _image(archive, found.image, number, found.values)
    for image in unnamed.values():
        yield _problem(image, "missing_label", f"{table.filename} does not name it. Add a row, or take the file out.")


def _metadata_rows(archive: ZipFile, table: ZipInfo) -> Iterator[Record | Problem]:
    read = _METADATA[_path(table).name]
    try:
        content = _content(archive, table)
    except DataError as error:
        yield Problem(error.code, error.message, 1)
    else:
        yield from read(content.splitlines(keepends=True))


def _described(record: Record, folder: PurePosixPath, images: Mapping[str, ZipInfo]) -> _Described | Problem:
    row = record.value
    if not isinstance(row, dict):
        return Problem("invalid_row", f"found {kind(row)}; expected file_name and label.", record.line)
    name = row.get("file_name")
    if "image" in row:
        message = "the key 'image' is not supported here; expected file_name, the name of an image of the zip."
        return Problem("unknown_key", message, record.line)
    image = images.get(str(folder / name)) if isinstance(name, str) else None
    if image is None:
        message = f"file_name is {shown(name)}; expected the name of an image of the zip, each once."
        return Problem("invalid_file_name", message, record.line)
    return _Described(image, {key: value for key, value in row.items() if key != "file_name"})


def _image(archive: ZipFile, member: ZipInfo, number: int, values: dict[str, object]) -> Record | Problem:
    try:
        content = _content(archive, member)
    except DataError as error:
        return _problem(member, error.code, error.message, number)
    return Record({"image": content, **values}, number, _location(member))


def _content(archive: ZipFile, member: ZipInfo) -> bytes:
    """A file's bytes, never more than it declares to have.

    Raises:
        DataError: it is encrypted, too large or damaged.
    """
    if member.flag_bits & _ENCRYPTED:
        raise DataError("the file is encrypted. Make the zip without a password.", code="encrypted_file")
    if member.file_size > MAX_FILE_BYTES:
        message = f"the file has {member.file_size:,} bytes; at most {MAX_FILE_BYTES:,} are taken. Scale it down."
        raise DataError(message, code="too_large")
    try:
        with archive.open(member) as file:
            content = file.read(member.file_size + 1)
    except _DAMAGE as error:
        raise DataError(f"the file cannot be read: {error}. Make the zip again.", code="invalid_zip") from error
    if len(content) != member.file_size:
        message = f"the file declares {member.file_size:,} bytes and has another size. Make the zip again."
        raise DataError(message, code="invalid_zip")
    return content


def _problem(member: ZipInfo, code: str, message: str, number: int | None = None) -> Problem:
    return Problem(code, message, number, _location(member))


def _location(member: ZipInfo) -> str:
    name = member.filename
    return f"File {name if name.isprintable() else repr(name)}"
