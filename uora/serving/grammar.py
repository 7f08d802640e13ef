"""Constrained decoding: answers that are JSON, or JSON of a schema."""

from __future__ import annotations


class Grammar:
    """A compiled constraint, shareable between answers."""
