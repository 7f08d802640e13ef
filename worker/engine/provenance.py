"""What made an answer, by digests."""

from __future__ import annotations

import hashlib
import json

from api.engines.provenance import Provenance
from uora.artifact import Manifest


def fingerprint(base_digest: str, manifest: Manifest | None) -> str:
    """OpenAI's ``system_fingerprint`` for a base model, and the frames and the adapter on it."""
    parts = [base_digest]
    if manifest is not None:
        parts += [_frames(manifest), manifest.digest]
    return "fp_" + hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]


def provenance(base_digest: str, manifest: Manifest | None) -> Provenance:
    """Digests of what answers."""
    if manifest is None:
        return Provenance(base=base_digest)
    frames = hashlib.sha256(_frames(manifest).encode()).hexdigest() if manifest.fingerprint else None
    return Provenance(base=base_digest, frames=frames, adapter=manifest.digest)


def _frames(manifest: Manifest) -> str:
    return json.dumps(manifest.fingerprint, sort_keys=True)
