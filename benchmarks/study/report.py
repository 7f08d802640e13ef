"""``docs/results.md``, ``docs/choosing.md`` and their plots, from the lines that there are."""

from __future__ import annotations

from pathlib import Path

from benchmarks.study import choosing, findings, plots
from benchmarks.study.lines import Lines
from benchmarks.study.plan import Study
from benchmarks.study.results import Results


def write(lines: Lines, docs: Path, *, study: Study | None = None) -> list[Path]:
    """Write all of it below ``docs``; the same bytes for the same lines.

    Returns:
        the files, in the order in which they were written.
    """
    results = Results(study or Study(), lines)
    images = docs / "images"
    images.mkdir(parents=True, exist_ok=True)
    pages = {docs / "results.md": findings.page(results), docs / "choosing.md": choosing.page(results)}
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
    return [*pages, *plots.draw(results, images)]
