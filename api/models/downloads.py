"""Fine-tuned models as files to take away."""

from __future__ import annotations

import io
import re
import zipfile
from dataclasses import dataclass
from functools import partial
from typing import Literal

from api.errors import InvalidRequest
from api.models.engine import ExportDtype, ExportRequest
from api.models.models import Adapter

#: As it is stored; the equal LoRA as PEFT reads it, zipped; or the base model with it, as transformers does, zipped.
AdapterFormat = Literal["uora", "lora", "merged"]
#: Larger LoRAs are made by an engine, not in the api's memory.
MAX_LORA_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class Download:
    """A file; the same ``etag`` means the same content. What an engine has to make has an ``order`` and no content."""

    filename: str
    media_type: str
    etag: str
    content: bytes = b""
    order: ExportRequest | None = None


def make_download(adapter: Adapter, form: AdapterFormat, dtype: ExportDtype | None) -> Download:
    """The adapter in one of its forms.

    Raises:
        InvalidRequest: ``dtype`` goes with merged models only.
    """
    if dtype is not None and form != "merged":
        raise InvalidRequest(f"dtype is of merged models only; leave it out for {form}.", param="dtype")
    # Names have colons, and base models' slashes.
    name = re.sub(r"[^\w.-]+", "-", adapter.id, flags=re.ASCII)
    if form == "uora":
        return Download(f"{name}.safetensors", "application/octet-stream", adapter.digest, content=adapter.artifact)
    as_zip = partial(Download, f"{name}-{form}.zip", "application/zip")
    content = _lora_zip(adapter.artifact) if form == "lora" else None
    if content is not None:
        return as_zip(f"{adapter.digest}-lora", content=content)
    order = ExportRequest(
        base_model=adapter.base_model, adapter=adapter.id, digest=adapter.digest, form=form, dtype=dtype
    )
    return as_zip("-".join(filter(None, (adapter.digest, form, dtype))), order=order)


def _lora_zip(content: bytes) -> bytes | None:
    """None if it needs the base model's weights, or is too large to be made here."""
    from uora.artifact import loads  # numpy is needed for nothing else here
    from uora.convert import lora_bytes, lora_files, scale
    from uora.spec import OsoraSpec

    artifact = loads(content)
    shapes = [(module.in_features, module.out_features) for module in artifact.manifest.modules]
    too_large = lora_bytes(shapes, scale(artifact).rank) > MAX_LORA_BYTES
    if too_large or isinstance(artifact.manifest.adapter, OsoraSpec):
        return None
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for file, data in lora_files(artifact).items():
            archive.writestr(zipfile.ZipInfo(file), data)  # without the time of day: one content for one etag
    return packed.getvalue()
