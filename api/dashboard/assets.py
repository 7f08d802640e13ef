"""Scripts, styles and images, as they are in the package: there is no build."""

from __future__ import annotations

import hashlib
from pathlib import Path

from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

FOLDER = Path(__file__).parent / "static"


def _digest(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


#: Part of every asset's path, so that browsers may keep each for good, those too that modules import by relative paths.
VERSION = _digest(FOLDER)


class Assets(StaticFiles):
    """Files below ``/{version}/``. Another version's are asked for while the service is upgraded: they are served as
    they are here, and kept by nobody."""

    def __init__(self) -> None:
        super().__init__(directory=FOLDER)

    async def get_response(self, path: str, scope: Scope) -> Response:
        """One file."""
        version, _, name = path.partition("/")
        response = await super().get_response(name, scope)
        kept = "public, max-age=31536000, immutable" if version == VERSION else "no-cache"
        response.headers["Cache-Control"] = kept
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response
