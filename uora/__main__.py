"""``python -m uora``."""

from uora.cli import app

app()
