"""Images in rows: to files' bytes, and these to pixels."""

from __future__ import annotations

import base64
import binascii
import io
import re
from typing import TYPE_CHECKING

from uora.data.values import kind, shown
from uora.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

#: Formats of photographs; Pillow's readers of rarer ones are not reached by a user's bytes.
_FORMATS = ("PNG", "JPEG", "WEBP")
#: How files of these begin.
_BEGINNING = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF....WEBP", re.DOTALL)
_DATA_URL = re.compile(r"data:image/(?:png|jpeg|webp);base64,")
#: An image is told its size before it is decoded: a small file can claim to be a huge one.
MAX_PIXELS = 50_000_000


def image_bytes(value: object) -> bytes:
    """The file's bytes of an image as a row has it: a data URL, bytes, or the ``{bytes, path}`` of Parquet files.

    Raises:
        DataError: it is none of these, or does not begin as an image does (code ``invalid_image``).
    """
    content = _found_bytes(value)
    if not _BEGINNING.match(content):
        raise DataError(f"the bytes are no image; expected a file of {', '.join(_FORMATS)}.", code="invalid_image")
    return content


def _found_bytes(value: object) -> bytes:
    match value:
        case str():
            return from_data_url(value)
        case bytes():
            return value
        case {"bytes": bytes(content)}:
            return content
        case {"path": path}:
            message = f"found the path {shown(path)} without bytes; expected the image itself in the file."
        case _:
            message = f"found {kind(value)}; expected a data URL, data:image/png;base64,..."
    raise DataError(message, code="invalid_image")


def from_data_url(url: str) -> bytes:
    """The file's bytes of ``data:image/png;base64,...`` (or jpeg, or webp).

    Raises:
        DataError: it is no such URL (code ``invalid_image``).
    """
    prefix = _DATA_URL.match(url)
    if prefix is None:
        raise DataError(
            f"found {shown(url)}; expected data:image/png;base64,... (or jpeg, or webp).", code="invalid_image"
        )
    try:
        return base64.b64decode(url[prefix.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"the data URL's base64 cannot be read: {error}.", code="invalid_image") from error


def open_image(content: bytes) -> Image.Image:
    """An image file's pixels, upright, in RGB.

    Raises:
        DataError: the bytes are no image of a known format, or too large a one (code ``invalid_image``).
    """
    try:
        return _decode(content)
    except DataError:
        raise
    except Exception as error:  # Pillow's readers raise errors of many kinds for damaged files
        raise DataError(
            f"the image cannot be read: {error}. Expected a whole file of {', '.join(_FORMATS)}.", code="invalid_image"
        ) from error


def _decode(content: bytes) -> Image.Image:
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise DataError(
                f"the image has {width} x {height} pixels; at most {MAX_PIXELS:,} are taken. Scale it down.",
                code="invalid_image",
            )
        return ImageOps.exif_transpose(image).convert("RGB")
