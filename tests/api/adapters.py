"""Real adapters, made without training and without torch."""

from __future__ import annotations

import numpy as np

from uora import layout
from uora.artifact import Artifact, Manifest, dumps
from uora.frames import fingerprint
from uora.layout import ModuleShape
from uora.spec import MethodName, parse_adapter


def make_adapter(method: MethodName = "uora", *, r: int = 2, size: int = 4) -> bytes:
    """An adapter of one module with ``size`` inputs and outputs; frames that are large are not probed."""
    spec = parse_adapter({"method": method, "r": r})
    modules = (ModuleShape(name="layers.0.q_proj", in_features=size, out_features=size),)
    manifest = Manifest(
        base_model="tiny",
        base_digest="b" * 64,
        chat_template_sha256="c" * 64,
        data_sha256="d" * 64,
        adapter=spec,
        modules=modules,
        fingerprint=fingerprint(layout.frame_keys(spec, modules)) if size < 1000 else {},
    )
    tensors = {name: np.ones(shape, dtype) for name, (shape, dtype) in layout.shapes(spec, modules).items()}
    return dumps(Artifact(manifest, tensors))
