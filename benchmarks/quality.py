"""Is UORA worth it? ``python -m benchmarks.quality [--smoke]``; the answer is in ``docs/results.md``.

Five methods beside full fine-tuning and a head alone on GLUE, E2E, chat and images. Every run is a line of
``benchmarks/results/quality.jsonl``; one that has its line is not made again, so this can be stopped at any time and
started again. ``python -m benchmarks.quality report`` writes ``docs/results.md``, ``docs/choosing.md`` and their plots
from the lines that there are.

About 430 runs. On two cores of an EPYC a tuning run of GLUE takes 25 to 65 seconds, and a final one 40 to 100: three
hours for GLUE, the most of it; ``--list`` estimates the rest from the lines that there are.

What it needs: the extra ``study``; ``glue/`` and ``e2e/`` beside the checkout or by ``--data``; Debian's package
dataset-fashion-mnist. Models and the chat rows are downloaded from the package index.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: its folder, whose names hide those of packages, is no place to import from
    sys.path[0] = str(ROOT)

from benchmarks.study import report  # noqa: E402
from benchmarks.study.lines import Lines  # noqa: E402
from benchmarks.study.plan import PARTS, Run, Study  # noqa: E402

if TYPE_CHECKING:
    from benchmarks.study.session import Session

RESULTS = ROOT / "benchmarks" / "results" / "quality.jsonl"
THREADS = 2


def main() -> None:
    """Make the runs that are missing, or write the report."""
    arguments = _arguments()
    if arguments.what == "report":
        written = report.write(Lines.read(arguments.results), arguments.docs)
        print("\n".join(map(str, written)))
    elif arguments.smoke:
        _smoke()
    else:
        _study(arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["run", "report"], default="run")
    parser.add_argument("--smoke", action="store_true", help="every row once, on tiny models and a handful of rows")
    parser.add_argument("--only", action="append", default=[], choices=[*PARTS, "tune"], help="may be given often")
    parser.add_argument("--list", action="store_true", help="what is missing, and about how long it takes")
    parser.add_argument("--limit-minutes", type=float, help="begin no run after so long")
    parser.add_argument("--run", metavar="KEY", help="make one run again and print its line; nothing is written")
    parser.add_argument("--data", type=Path, help="folder with glue/ and e2e/")
    parser.add_argument("--cache", type=Path, default=os.environ.get("UORA_CACHE_DIR", Path.home() / ".cache" / "uora"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--threads", type=int, default=THREADS, help="recorded with every line")
    return parser.parse_args()


def _study(arguments: argparse.Namespace) -> None:
    from filelock import FileLock, Timeout

    lines = Lines.read(arguments.results)
    session = _session(Study(), lines, arguments)
    only = frozenset(arguments.only)
    if arguments.list:
        _list(session, only)
        return
    if arguments.run:
        _again(session, arguments.run)
        return
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{arguments.results}.lock", timeout=0):
            _make_all(session, only, limit_minutes=arguments.limit_minutes)
    except Timeout:
        sys.exit(f"Another process writes {arguments.results}. Runs are made one at a time; wait for its end.")


def _session(study: Study, lines: Lines, arguments: argparse.Namespace) -> Session:
    import torch

    from benchmarks.study.bases import Bases
    from benchmarks.study.data import Places
    from benchmarks.study.running import Runner
    from benchmarks.study.session import Session

    torch.set_num_threads(arguments.threads)
    places = Places.of(arguments.data, Path(arguments.cache).expanduser())
    return Session(study, lines, Runner(Bases(places)))


def _make_all(session: Session, only: frozenset[str], *, limit_minutes: float | None = None) -> None:
    begun = time.monotonic()
    while (planned := session.plan(only)).runs:
        if limit_minutes is not None and time.monotonic() - begun > 60 * limit_minutes:
            print(f"{limit_minutes:g} minutes are over; {len(planned.runs)} runs are left.")
            return
        for line in session.make(session.first_of(planned.runs)):
            session.lines.add(line)
            print(
                f"{line.key}: {line.metric} {line.score:.2f}, {line.total_seconds:.0f} s, {line.hits} hits", flush=True
            )
    if planned.waiting:
        print(f"{planned.waiting} runs wait for learning rates; make the tuning runs first: --only tune.")


def _list(session: Session, only: frozenset[str]) -> None:
    from benchmarks.study.session import estimated_seconds

    planned = session.plan(only)
    seconds: Counter[str] = Counter()
    for run in planned.runs:
        spent = estimated_seconds(run, session.lines)
        seconds[_row(run)] += round(spent)
        print(f"{spent / 60:6.1f} min  {run.key}")
    for row, spent in seconds.items():
        print(f"{spent / 60:6.1f} min  {row}")
    print(
        f"{seconds.total() / 60:6.1f} min for {len(planned.runs)} runs; {planned.waiting} more wait for learning rates."
    )


def _row(run: Run) -> str:
    return f"{run.part} {run.purpose}"


def _again(session: Session, key: str) -> None:
    from benchmarks.study.plan import plan

    known = {run.key: run for run in plan(session.study, session.lines).runs}
    if key not in known:
        sys.exit(f"The plan has no run {key!r}. See benchmarks/results/quality.jsonl and --list.")
    print(json.dumps(asdict(*session.make([known[key]]))))


def _smoke() -> None:
    """The whole plan in small, and its report."""
    import torch

    from benchmarks.study import tiny_data
    from benchmarks.study.bases import Bases
    from benchmarks.study.running import Runner
    from benchmarks.study.session import Session

    torch.set_num_threads(1)  # tiny models are fastest so
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="uora-study-") as folder:
        home = Path(folder)
        lines = Lines.read(home / "quality.jsonl")
        bases = Bases(tiny_data.write(home), tiny_in=home)
        session = Session(Study.smoke(), lines, Runner(bases, max_answer_tokens=4))
        _make_all(session, frozenset())
        written = report.write(Lines.read(home / "quality.jsonl"), home / "docs", study=session.study)
        pages = [str(path.relative_to(home)) for path in written]
    runs = Counter(f"{line.part} {line.purpose}" for line in lines.all())
    print(json.dumps({"runs": runs, "pages": pages, "seconds": round(time.perf_counter() - begun, 1)}))


if __name__ == "__main__":
    main()
