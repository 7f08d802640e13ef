"""Fine-tuned models as files to take away."""

from __future__ import annotations

import io
import re
import zipfile
from dataclasses import dataclass
from typing import Literal

from api.errors import InvalidRequest
from api.models.models import Adapter

#: As it is stored; or the equal LoRA as PEFT reads it, zipped.
AdapterFormat = Literal["uora", "lora"]
#: Larger LoRAs are made by the command line, not in the api's memory.
MAX_LORA_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class Download:
    """A file; the same ``etag`` means the same content."""

    content: bytes
    filename: str
    media_type: str
    etag: str


def make_download(adapter: Adapter, form: AdapterFormat) -> Download:
    """The adapter in one of its forms.

    Raises:
        InvalidRequest: its LoRA needs the base model's weights, or is too large to be made here.
    """
    # Names have colons, and base models' slashes.
    name = re.sub(r"[^\w.-]+", "-", adapter.id, flags=re.ASCII)
    if form == "uora":
        return Download(adapter.artifact, f"{name}.safetensors", "application/octet-stream", adapter.digest)
    return Download(_lora_zip(adapter.artifact), f"{name}-lora.zip", "application/zip", f"{adapter.digest}-lora")


def _lora_zip(content: bytes) -> bytes:
    from uora.artifact import loads  # numpy is needed for nothing else here
    from uora.convert import lora_bytes, lora_files, scale
    from uora.spec import OsoraSpec

    artifact = loads(content)
    if isinstance(artifact.manifest.adapter, OsoraSpec):
        raise _use_command("An osora adapter is converted with its base model's weights, which the api does not have")
    shapes = [(module.in_features, module.out_features) for module in artifact.manifest.modules]
    size = lora_bytes(shapes, scale(artifact).rank)
    if size > MAX_LORA_BYTES:
        raise _use_command(f"This adapter's LoRA has {size:,} bytes; at most {MAX_LORA_BYTES:,} are made here")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for file, data in lora_files(artifact).items():
            archive.writestr(zipfile.ZipInfo(file), data)  # without the time of day: one content for one etag
    return packed.getvalue()


def _use_command(reason: str) -> InvalidRequest:
    return InvalidRequest(
        f"{reason}. Download it with format=uora and run: python -m uora export FILE --to lora DIRECTORY.",
        param="format",
        code="unsupported_format",
    )
