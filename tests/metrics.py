"""Reading metrics in tests."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

Labels = dict[str, str]


def parse(text: str) -> dict[str, list[tuple[Labels, float]]]:
    """Samples by their names."""
    found: dict[str, list[tuple[Labels, float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def read(registry: CollectorRegistry) -> dict[str, list[tuple[Labels, float]]]:
    """What a scrape of the registry would find."""
    return parse(generate_latest(registry).decode())


def value(samples: dict[str, list[tuple[Labels, float]]], name: str, **labels: str) -> float:
    """The sum of the samples that have the labels; 0 without any."""
    return sum(value for found, value in samples.get(name, ()) if labels.items() <= found.items())
