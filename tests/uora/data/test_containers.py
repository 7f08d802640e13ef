"""Files to records: every container holds the same rows, and each that is broken is told so, with the place."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.uora.data.files import png, write_array, write_lines, write_parquet, write_table
from uora.data import ImageRow, Problem, TextRow, read_file, scan_file
from uora.data.containers import arrays, container_of, parquet, tables
from uora.data.formats import place
from uora.errors import DataError

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
answers = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": texts}, optional={"weight": st.sampled_from([0, 1])}
)
conversations = st.builds(
    lambda question, others, last: {"messages": [{"role": "user", "content": question}, *others, last]},
    texts,
    st.lists(answers, max_size=2),
    st.fixed_dictionaries({"role": st.just("assistant"), "content": texts}),
)


@given(rows=st.lists(conversations, min_size=1, max_size=8))
def test_the_container_does_not_change_the_rows(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    path = tmp_path_factory.mktemp("files") / "upload"
    expected = read_file(write_lines(path, rows), "chat").rows
    assert len(expected) == len(rows)
    for write in (write_array, write_parquet):
        assert read_file(write(path, rows), "chat").rows == expected


CELLS = st.text(st.sampled_from(list("a\",\n\r;' é☃\ufeff")), min_size=1, max_size=6)


@given(rows=st.lists(st.fixed_dictionaries({"text": CELLS, "label": CELLS}), min_size=1, max_size=6))
def test_any_text_is_a_cell(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]]) -> None:
    path = write_table(tmp_path_factory.mktemp("files") / "upload", rows)
    read = read_file(path, "classification").rows
    assert [(row.text, row.label) for row in read if isinstance(row, TextRow)] == [
        (row["text"], row["label"]) for row in rows
    ]


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
def test_arrays_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(arrays, "_CHUNK_CHARACTERS", chunk)
    rows = [{"text": "é☃ [1,] }", "label": value} for value in (12.5, -3, 1e-3, 0)]
    path = tmp_path / "upload"
    path.write_text("\ufeff \n" + json.dumps(rows, indent=1, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert [row.label for row in read_file(path, "regression").rows if isinstance(row, TextRow)] == [12.5, -3, 1e-3, 0]


@pytest.mark.parametrize("write", [write_lines, write_array, write_table, write_parquet])
def test_places_are_those_of_the_container(tmp_path: Path, write: Callable[[Path, Sequence[Any]], Path]) -> None:
    rows = [{"text": "a", "label": "x"}, {"text": "", "label": "y"}, {"text": "c\nd", "label": "x"}]
    places = {
        write_lines: ["Line 1", "Line 2", "Line 3"],
        write_table: ["Line 2", "Line 3", "Line 4"],
        write_array: ["Row 1", "Row 2", "Row 3"],
        write_parquet: ["Row 1", "Row 2", "Row 3"],
    }[write]
    path = write(tmp_path / "upload", rows)
    assert [place(found) for found in scan_file(path, "classification")] == places
    with pytest.raises(DataError, match=rf"^{places[1]}: text is empty") as caught:
        read_file(path, "classification")
    assert (caught.value.location, caught.value.line) == (places[1], int(places[1].split()[1]))


def test_columns_that_are_empty_are_absent(tmp_path: Path) -> None:
    rows = [{"text": "a", "text_pair": "b", "label": "x"}, {"text": "c", "text_pair": "", "label": "y"}]
    expected = (TextRow("a", "b", "x", 2), TextRow("c", None, "y", 3))
    assert read_file(write_table(tmp_path / "upload", rows), "classification").rows == expected

    rows = [{"text": "a", "text_pair": "b", "label": 1}, {"text": "c", "label": 2}]
    expected = (TextRow("a", "b", 1.0, 1), TextRow("c", None, 2.0, 2))
    assert read_file(write_parquet(tmp_path / "upload", rows), "regression").rows == expected


def test_cells_are_numbers_where_numbers_are_asked_for(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "1"}, {"text": "b", "label": "-2.5e1"}, {"text": "c", "label": "1_0"}]
    path = write_table(tmp_path / "upload", rows)
    assert [row.label for row in read_file(path, "classification").rows if isinstance(row, TextRow)] == [
        "1",
        "-2.5e1",
        "1_0",
    ]
    assert [row.label for row in scan_file(path, "regression") if isinstance(row, TextRow)] == [1.0, -25.0]
    with pytest.raises(DataError, match="Line 4: label is a string; expected a number"):
        read_file(path, "regression")


def test_a_byte_order_mark_before_a_header(tmp_path: Path) -> None:
    path = tmp_path / "upload"
    path.write_bytes(b'\xef\xbb\xbf"text",label\r\n"a ""b"", c\r\nd",x\r\n\r\ne,y\r\n')
    expected = (TextRow('a "b", c\r\nd', None, "x", 2), TextRow("e", None, "y", 5))
    assert read_file(path, "classification").rows == expected


@pytest.mark.parametrize("as_stored", [lambda content: content, lambda content: {"bytes": content, "path": "a.png"}])
def test_images_in_parquet(tmp_path: Path, as_stored: Callable[[bytes], Any]) -> None:
    rows = [{"image": as_stored(png(color)), "label": label} for color, label in ((0, 1), (255, 0))]
    features = {"label": {"names": ["white", "black"], "_type": "ClassLabel"}}
    path = write_parquet(tmp_path / "upload", rows, info={"features": features})
    expected = (ImageRow(png(0), "black", 1), ImageRow(png(255), "white", 2))
    assert read_file(path, "image-classification").rows == expected


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ({"bytes": None, "path": "a.png"}, "found the path 'a.png' without bytes"),
        (b"GIF89a", "the bytes are no image; expected a file of PNG, JPEG, WEBP"),
        (3, "found a number; expected a data URL"),
    ],
)
def test_images_that_are_none(tmp_path: Path, image: Any, words: str) -> None:
    path = write_parquet(tmp_path / "upload", [{"image": image, "label": "x"}])
    with pytest.raises(DataError, match=r"^Row 1: image: ") as caught:
        read_file(path, "image-classification")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "features"),
    [([0, 2], {"label": {"names": ["a", "b"]}}), ([0, -1], {"label": {"names": ["a", "b"]}}), ([0, 1], {"label": {}})],
)
def test_numbers_without_a_name_stay_numbers(tmp_path: Path, labels: list[int], features: Any) -> None:
    rows = [{"text": "t", "label": label} for label in labels]
    path = write_parquet(tmp_path / "upload", rows, info={"features": features})
    with pytest.raises(DataError, match="label is a number; expected the name of a class"):
        read_file(path, "classification")


ONE = b'{"text": "a", "label": "x"}'
HALF = ONE[:11]


@pytest.mark.parametrize(
    ("content", "code", "location", "words"),
    [
        (b"[" + ONE + b", " + HALF, "invalid_json", "Row 2", "Unterminated string"),
        (b"[" + ONE + b" " + ONE + b"]", "invalid_json", "Row 1", "Expecting ','"),
        (b"[" + ONE + b",]", "invalid_json", "Row 2", "Expecting value"),
        (b"[" + ONE, "invalid_json", "Row 1", "Expecting ',' or ']'"),
        (b"[" + ONE + b"] x", "invalid_json", "Row 1", "Extra data after the array"),
        (b"[" * 100_000, "invalid_json", "Row 1", "not JSON"),
        (b"[" + ONE + b', {"text": "\xe9"}]', "invalid_encoding", None, "not UTF-8 (0xe9)"),
        (b"[" + ONE + b", 3]", "invalid_row", "Row 2", "found a number"),
        (b"[]", "empty_file", None, "expected objects in the array (classification)"),
        (b"text,label\na,x\nb\n", "invalid_csv", "Line 3", "found 1 cells; the header has 2 columns"),
        (b"text,label\na,x\nb,y,z\n", "invalid_csv", "Line 3", "found 3 cells"),
        (b'text,label\n\na,x\n"b\n\n,y\n', "invalid_csv", "Line 4", "unexpected end of data"),
        (b'text,label\n"b"c,y\n', "invalid_csv", "Line 2", "not CSV"),
        (b"text,label\na,x\nb\xe9,y\n", "invalid_encoding", "Line 3", "byte 2 is not UTF-8 (0xe9)"),
        (b"text,label,text\na,x,b\n", "invalid_header", "Line 1", "'text' twice"),
        (b"text,label, \na,x,b\n", "invalid_header", "Line 1", "no name for column 3"),
        (b"text,label,id\na,x,7\n", "unknown_key", "Line 2", "the key 'id'"),
        (b"text,label\n", "empty_file", None, "expected lines below the header"),
        (b"text;label\na;x\n", "unknown_container", None, "begins with b'text;label'"),
        ("text,label\na,x".encode("utf-16"), "unknown_container", None, "in UTF-8"),
        (b"\x1f\x8b\x08\x00", "unknown_container", None, "Expected JSON Lines"),
        (b"PAR1", "invalid_parquet", None, "cannot be read on after row 0"),
        (b"PAR1" + b"\0" * 100 + b"PAR1", "invalid_parquet", None, "Write it again"),
    ],
)
def test_what_is_broken_is_named(tmp_path: Path, content: bytes, code: str, location: str | None, words: str) -> None:
    path = tmp_path / "upload"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_file(path, "classification")
    assert (caught.value.code, caught.value.location) == (code, location)
    assert words in str(caught.value)


def test_damage_after_good_rows_of_parquet(tmp_path: Path) -> None:
    rows = [{"text": f"{i}" * 400, "label": "x"} for i in range(200)]
    path = write_parquet(tmp_path / "upload", rows, row_group_size=100)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4000] = b"\xff" * 4000
    path.write_bytes(content)
    found = list(scan_file(path, "classification"))
    assert getattr(found[-1], "code", None) == "invalid_parquet"


@pytest.mark.parametrize(
    ("module", "limit", "words"),
    [
        (tables, "MAX_CELL_CHARACTERS", "field larger than field limit"),
        (parquet, "MAX_GROUP_BYTES", "choose a smaller row_group_size"),
    ],
)
def test_memory_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, limit: str, words: str
) -> None:
    monkeypatch.setattr(module, limit, 300)
    write = {tables: write_table, parquet: write_parquet}[module]
    path = write(tmp_path / "upload", [{"text": "ab" * 200, "label": "x"}])
    with pytest.raises(DataError, match=words):
        read_file(path, "classification")


class CountingBytes(io.BytesIO):
    """Counts what is read of it."""

    taken = 0

    def read1(self, size: int | None = -1, /) -> bytes:
        content = super().read1(size)
        self.taken += len(content)
        return content


def test_an_array_that_is_broken_early_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "MAX_ITEM_CHARACTERS", 300)
    monkeypatch.setattr(arrays, "_CHUNK_CHARACTERS", 100)
    file = CountingBytes(b'[{"text": "' + b"a" * 1_000_000)
    (problem,) = arrays.read_array(file)
    assert isinstance(problem, Problem)
    assert problem.code == "invalid_json"
    assert file.taken < 20_000


@pytest.mark.parametrize(
    ("content", "container"),
    [
        (b"", "jsonl"),
        (b"\n {", "jsonl"),
        (b"\xef\xbb\xbf3\n", "jsonl"),
        (b"\xef\xbb\xbf [", "json"),
        (b'"a, b",label\n', "csv"),
        (b"text\r\n", "csv"),
        (b"PAR1", "parquet"),
        (b"PK\x03\x04", "zip"),
        (b"PK\x05\x06", "zip"),
    ],
)
def test_containers_are_told_by_their_content(tmp_path: Path, content: bytes, container: str) -> None:
    path = tmp_path / "upload.txt"
    path.write_bytes(content)
    assert container_of(path) == container
