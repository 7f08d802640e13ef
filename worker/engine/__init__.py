"""The inference engine: one base model, every tenant's adapters, one batch."""

from importlib import import_module

from worker.collector import spared

with spared():
    import_module("worker.engine.runner")  # with torch and transformers, which all modules here need
