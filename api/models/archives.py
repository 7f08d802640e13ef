"""What is in an uploaded adapter: ours, or a PEFT folder in a zip or tar. Bounded in size, and never unpickled."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath

from api.errors import InvalidRequest, TooLarge

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
#: PEFT's older form, a pickle: whoever reads it runs what is in it.
PICKLED = "adapter_model.bin"
MAX_CONFIG_BYTES = 1024 * 1024
MAX_MEMBERS = 1000


@dataclass(frozen=True)
class Packed:
    """Files of a PEFT folder by their plain names."""

    config: bytes
    weights: bytes


def unpack(content: bytes, *, max_bytes: int) -> Packed | None:
    """The two files of a PEFT folder that matter; None if ``content`` is no archive.

    Raises:
        InvalidRequest: a damaged archive, or one without them.
        TooLarge: they have more than ``max_bytes``.
    """
    try:
        if content.startswith(b"PK"):
            return _unzip(content, max_bytes)
        if content.startswith(b"\x1f\x8b"):
            return _untar(content, "r:gz", max_bytes)
        if content[257:262] == b"ustar":
            return _untar(content, "r:", max_bytes)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, RuntimeError, NotImplementedError) as error:
        raise InvalidRequest(f"The archive cannot be read: {error}.", param="file", code="invalid_archive") from error
    return None


def _unzip(content: bytes, max_bytes: int) -> Packed:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [info for info in archive.infolist()[:MAX_MEMBERS] if not info.is_dir()]
        sizes = {info.filename: info.file_size for info in members}
        return _pick(sizes, lambda name, size: archive.open(name).read(size + 1), max_bytes)


def _untar(content: bytes, mode: str, max_bytes: int) -> Packed:
    with tarfile.open(fileobj=io.BytesIO(content), mode=mode) as archive:  # type: ignore[call-overload] # one of two
        sizes: dict[str, int] = {}
        for member in archive:  # what a compressed one unpacks to is limited before it is read
            if member.isreg():
                sizes[member.name] = member.size
            if sum(sizes.values()) > max_bytes or len(sizes) > MAX_MEMBERS:
                raise _too_large(max_bytes)

        def read(name: str, size: int) -> bytes:
            source = archive.extractfile(name)
            assert source is not None  # noqa: S101 # a regular file
            with source:
                found: bytes = source.read(size + 1)
            return found

        return _pick(sizes, read, max_bytes)


def _pick(sizes: dict[str, int], read: Callable[[str, int], bytes], max_bytes: int) -> Packed:
    config, weights = _find(sizes, CONFIG), _find(sizes, WEIGHTS)
    if config is None or weights is None:
        pickled = _find(sizes, PICKLED) is not None
        hint = f" {PICKLED} is a pickle and is never read; save the adapter with safe_serialization=True." * pickled
        raise InvalidRequest(
            f"The archive has {len(sizes)} files; expected {CONFIG} and {WEIGHTS}, each once.{hint}",
            param="file",
            code="invalid_archive",
        )
    if sizes[config] > MAX_CONFIG_BYTES or sizes[weights] > max_bytes:
        raise _too_large(max_bytes)
    return Packed(_exactly(read, config, sizes[config]), _exactly(read, weights, sizes[weights]))


def _exactly(read: Callable[[str, int], bytes], name: str, size: int) -> bytes:
    found = read(name, size)
    if len(found) != size:
        raise InvalidRequest(f"{name} has another size than the archive says.", param="file", code="invalid_archive")
    return found


def _find(sizes: dict[str, int], wanted: str) -> str | None:
    """The only member of that name, in whatever folder."""
    found = [name for name in sizes if PurePosixPath(name).name == wanted]
    return found[0] if len(found) == 1 else None


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(f"The adapter has more than {max_bytes:,} bytes.", param="file")
