"""Images in rows: whole, upright, in RGB, and never larger than memory."""

from __future__ import annotations

import base64
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from uora.data import from_data_url, images, open_image
from uora.errors import DataError


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
@given(content=st.binary())
def test_data_urls_hold_any_bytes(kind: str, content: bytes) -> None:
    assert from_data_url(f"data:image/{kind};base64,{base64.b64encode(content).decode()}") == content


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_known_formats_become_rgb(kind: str, mode: str) -> None:
    opened = open_image(encoded(Image.new(mode, (3, 2), 200 if mode == "L" else (200, 10, 10)), kind))
    assert (opened.mode, opened.size) == ("RGB", (3, 2))


def test_palettes_and_transparency_become_rgb() -> None:
    for mode in ("P", "RGBA", "1", "I;16"):
        assert open_image(encoded(Image.new(mode, (2, 2)))).mode == "RGB"


def test_a_photo_taken_sideways_is_turned() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by a quarter
    assert open_image(encoded(Image.new("RGB", (4, 2)), "JPEG", exif=exif)).size == (2, 4)


@pytest.mark.parametrize(
    "content",
    [b"", b"not an image", encoded(Image.new("RGB", (40, 40)))[:-30], encoded(Image.new("RGB", (4, 4)), "BMP")],
)
def test_what_is_no_whole_image_is_refused(content: bytes) -> None:
    with pytest.raises(DataError, match=r"cannot be read: .* whole file of PNG, JPEG, WEBP") as caught:
        open_image(content)
    assert caught.value.code == "invalid_image"


def test_a_small_file_of_a_huge_image_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 99)
    assert open_image(encoded(Image.new("L", (9, 11))))
    with pytest.raises(DataError, match="10 x 10 pixels; at most 99"):
        open_image(encoded(Image.new("L", (10, 10))))


@given(content=st.binary(max_size=60))
def test_any_bytes_are_judged(content: bytes) -> None:
    for prefix in (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\x00\x00\x00\x00WEBP"):
        with pytest.raises(DataError):
            open_image(prefix + content)
