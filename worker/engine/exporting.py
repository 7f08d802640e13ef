"""``POST /export``: a fine-tuned model in a form that stands on the base model's weights, zipped piece by piece."""

from __future__ import annotations

import tempfile
import threading
import zipfile
from collections.abc import Generator, Iterator
from pathlib import Path

import structlog
import torch

from api.models.engine import ExportRequest
from uora.artifact import Artifact
from uora.convert import write_lora
from uora.errors import AdapterNotFoundError, ExportError, NonFiniteError, UoraError
from uora.merging import write_merged
from uora.svd import BaseWeights
from worker.engine.errors import EngineError
from worker.engine.runner import Served

log = structlog.get_logger()

#: Read from a file at once.
_PIECE = 1024 * 1024
#: A whole base model is in memory for each.
_ONE_AT_A_TIME = threading.Lock()
RETRY_SECONDS = 10.0


def export(served: Served, body: ExportRequest, *, cache_dir: Path) -> Generator[bytes, None, None]:
    """Make the files in a temporary folder, which ends with the iteration; the first piece comes when they are made.

    Raises:
        EngineError: the adapter is not there (404), is not what it should be (500), cannot be had so (400), or another
            export is under way (503).
    """
    if body.base_model != served.base.name:
        raise EngineError(404, "model_not_found", f"This engine serves {served.base.name}, not {body.base_model}.")
    if not _ONE_AT_A_TIME.acquire(blocking=False):
        raise EngineError(
            503, "engine_busy", "Another export is being made; try again in a moment.", retry_after=RETRY_SECONDS
        )
    try:
        with tempfile.TemporaryDirectory(prefix="uora-export-") as scratch:
            folder = Path(scratch) / "model"
            _write(served, body, folder, cache_dir)
            yield from zip_pieces(folder)
    finally:
        _ONE_AT_A_TIME.release()


def _write(served: Served, body: ExportRequest, folder: Path, cache_dir: Path) -> None:
    try:
        artifact = served.store.load(body.adapter, body.digest)
        if body.form == "lora":
            write_lora(artifact, folder, base=_weights(served, artifact, cache_dir), cache_dir=cache_dir)
        else:
            dtype = None if body.dtype is None else getattr(torch, body.dtype)
            write_merged(artifact, folder, local=served.base, dtype=dtype, cache_dir=cache_dir)
    except AdapterNotFoundError as error:
        raise EngineError(404, error.code, error.message) from error
    except (ExportError, NonFiniteError) as error:
        raise EngineError(400, error.code, error.message, param="format") from error
    except UoraError as error:
        log.exception("export_failed", model=body.adapter)
        raise EngineError(500, error.code, error.message) from error


def _weights(served: Served, artifact: Artifact, cache_dir: Path) -> BaseWeights:
    return BaseWeights.of_local(served.base, artifact.manifest.task, cache_dir)


class _Written:
    """What an archive has written since the last look; it cannot go back in it."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def write(self, data: bytes, /) -> int:
        """Take in more."""
        self._pieces.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        """There is nothing behind it."""

    def close(self) -> None:
        """Nor is there anything to close."""

    def take(self) -> bytes:
        """Give it away."""
        taken, self._pieces = b"".join(self._pieces), []
        return taken


def zip_pieces(folder: Path) -> Iterator[bytes]:
    """A zip of a folder's files, not compressed, a piece of them in memory at a time; the same for the same files."""
    written = _Written()
    with zipfile.ZipFile(written, "w") as archive:
        for file in sorted(folder.iterdir()):
            with file.open("rb") as source, archive.open(zipfile.ZipInfo(file.name), "w", force_zip64=True) as entry:
                while piece := source.read(_PIECE):
                    entry.write(piece)
                    yield written.take()
    yield written.take()
