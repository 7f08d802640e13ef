"""Celery's tasks. Each is a few lines: claim, call, record."""
