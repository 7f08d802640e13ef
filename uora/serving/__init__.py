"""Serving many adapters on one base model, mixed freely in one batch."""
