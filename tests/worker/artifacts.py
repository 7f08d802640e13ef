"""A valid adapter, made without training."""

from __future__ import annotations

import numpy as np

from tests.worker.support import BASE_MODEL
from uora.artifact import Artifact, Manifest, ModuleShape, dumps
from uora.spec import UoraSpec


def make_artifact(*, base_model: str = BASE_MODEL, r: int = 2) -> bytes:
    """An adapter of one small module."""
    module = ModuleShape(name="layers.0.q_proj", in_features=4, out_features=3)
    manifest = Manifest(
        base_model=base_model,
        base_digest="b" * 64,
        chat_template_sha256="c" * 64,
        data_sha256="d" * 64,
        adapter=UoraSpec(r=r),
        modules=(module,),
        fingerprint={},
    )
    tensors = {
        "d": np.full((1, r), 0.1, dtype=np.float32),
        "b": np.zeros(3, dtype=np.float32),
        "hits": np.zeros(r, dtype=np.int32),
    }
    return dumps(Artifact(manifest, tensors))
