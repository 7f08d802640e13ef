"""What answered, as the engine says it to the api and the api to its clients."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

#: How much of a digest tells what answered.
_DIGEST_LETTERS = 16


class Provenance(BaseModel):
    """What answers: digests of the base model, the frames and the adapter; the latter two only where there are any."""

    model_config = ConfigDict(frozen=True)

    base: str
    frames: str | None = None
    adapter: str | None = None

    def header(self) -> str:
        """Value of ``x-uora-provenance``."""
        named = self.model_dump(exclude_none=True)
        return "; ".join(f"{name}={digest[:_DIGEST_LETTERS]}" for name, digest in named.items())
