"""``docs/results.md``: what was measured, and who wins, ties and loses by it."""

from __future__ import annotations

from benchmarks.study import hits
from benchmarks.study.data import SUBSET_SEED
from benchmarks.study.markdown import NOTHING, number, paragraphs, rate, table
from benchmarks.study.plan import HEAD_RATE, PARTS, TUNING_SEED, Config, Part, Size, Study, Task
from benchmarks.study.results import Results
from benchmarks.study.scoring import TITLES
from benchmarks.study.tables import PART_TITLES, digits, heads_table, main_table, targets_table
from benchmarks.study.verdicts import in_short

GENERATED = "<!-- Written by `python -m benchmarks.quality report` from benchmarks/results/quality.jsonl. -->"


def page(results: Results) -> str:
    """The whole page."""
    return paragraphs(
        GENERATED,
        "# Is UORA worth it?",
        state(results),
        "## In short",
        *in_short(results),
        "## What was run",
        *_what(results),
        *_part(results, "glue"),
        *_part(results, "e2e"),
        *_part(results, "chat"),
        *_part(results, "images"),
        *hits.section(results),
        *_targets(results),
        *_rates(results),
        *_again(),
    )


def state(results: Results) -> str:
    """How much of the study is there, and what is missing."""
    done, known = results.count(lambda _: True)
    waiting = results.planned.waiting
    if done == known and not waiting:
        return f"All {done} runs of the study are there."
    parts = []
    for part in PARTS:
        have, want = results.count(lambda run, part=part: run.part == part)  # type: ignore[misc]
        if have < want:
            parts.append(f"{PART_TITLES[part]} {want - have}")
    missing = f"Missing of those that can be made now: {', '.join(parts)}." if parts else ""
    more = f"{waiting} more wait for a learning rate to be tuned." if waiting else ""
    return " ".join(filter(None, [f"**Incomplete: {done} runs are there.**", missing, more, _UNJUDGED]))


_UNJUDGED = "Nothing is concluded from configurations that lack a seed."


# --- what was run


def _what(results: Results) -> list[str]:
    rows = [
        [
            task.title,
            task.base,
            _amount(task.size),
            number(task.size.test) if task.size.test else "all",
            str(task.batch),
            ", ".join(map(str, task.seeds)),
            _tuned(results.study, task),
            TITLES[task.metric],
        ]
        for task in results.study.tasks
    ]
    header = ["data", "base model", "trained on", "scored", "batch", "seeds", "tuned on", "metric"]
    machines = sorted({f"{_clock(line.machine, line.threads)}, {line.dtype}" for line in results.lines.all()})
    timed = _clock(*results.clock) if machines else ""
    return [
        table(header, rows, words=len(header)),
        f"Subsets are the first rows of the official train set in the order of seed {SUBSET_SEED}; GLUE is scored on "
        "the official dev set, E2E on meanings of its test set with all their references (it is trained on its dev "
        "set). Learning rates are tuned for each method, rank and targets on rows held out of train, with seed "
        f"{TUNING_SEED}, up and down 1, 3, 10, ... until the best has a worse one on each side or three steps are "
        "made, then between the best and its neighbours (2, 5); never on what is scored. Heads learn at "
        f"{rate(HEAD_RATE)} beside whatever is trained; a head alone is tuned. MRPC, CoLA and RTE have too few rows to "
        "hold out enough of them: among 300 the standard error of an accuracy of 70 is 2.6 points. For every method "
        "alike, CoLA takes the rates of SST-2, and MRPC and RTE, whose rows are pairs of texts, those of STS-B. AdamW, "
        "linear decay, warm-up over 6 % of the steps.",
        "Adapters are trained and served by the service's own code, over base models in float32, so that scores do not "
        "depend on whether the processor computes in bfloat16. Scores are times 100, with the standard deviation over "
        "seeds. Trained numbers are without the head; stored bytes are with it, in float32. Seconds are those of "
        "training steps. The seeds of an adapter that can share its passes (UORA and OSoRA on E2E and chat) are "
        "trained together, as the service trains small jobs, and each has the same share of the seconds.",
        f"Measured on: {'; '.join(machines)}. Seconds are those of {timed}; of the other runs only scores, sizes and "
        "hits are used."
        if machines
        else "",
    ]


def _clock(machine: str, threads: int) -> str:
    return f"{machine}, {threads} thread{'s' if threads > 1 else ''}"


def _tuned(study: Study, task: Task) -> str:
    if task.rates_of is not None:
        return f"as {study.task(task.rates_of).title}"
    by = f", by {TITLES[task.tuning_metric]}" if task.tuning_metric else ""
    return f"{_amount(task.tuning)}; {task.tuning.test:,} held out{by}"


def _amount(size: Size) -> str:
    return f"{size.train:,} rows, {size.epochs} epoch{'s' if size.epochs > 1 else ''}"


def _part(results: Results, part: Part) -> list[str]:
    tasks = results.study.in_part(part)
    title, body = f"## {PART_TITLES[part]}", main_table(results, tasks)
    missing = "" if body else "Not measured yet."
    return [title, body, missing, f"![{PART_TITLES[part]}: score by learning rate](images/rates-{part}.svg)"]


# --- targets, rates


def _targets(results: Results) -> list[str]:
    body = targets_table(results)
    return ["## Targets", body or "Not measured yet."]


def _rates(results: Results) -> list[str]:
    rows = []
    for task in results.study.tasks:
        seen: set[Config] = set()
        for _, other, config in results.study.wanted():
            if other != task or config.tuned in seen:
                continue
            seen.add(config.tuned)
            tried = results.tuning(task, config)
            final = results.find(task, config.tuned)
            if tried:
                where = f" on {config.targets}" if config.targets else ""
                places = digits(tried[0].metric)
                scores = ", ".join(f"{rate(line.learning_rate)}: {line.score:.{places}f}" for line in tried)
                rows.append(
                    [task.title, config.tuned.label + where, rate(final.learning_rate) if final else NOTHING, scores]
                )
    body = table(["data", "method", "taken", "tried, with the score on held-out rows of train"], rows, words=4)
    heads = heads_table(results)
    beside = ["Of the head, beside the adapter at its best rate, on held-out rows of train:", heads] if heads else []
    return ["## Learning rates", body if rows else "Not measured yet.", *beside]


def _again() -> list[str]:
    return [
        "## Again",
        "```sh\npython -m benchmarks.quality --list     # what is missing, and about how long it takes\n"
        "python -m benchmarks.quality            # makes it; can be stopped and started again\n"
        "python -m benchmarks.quality report     # writes this page\n```",
        "Each line of `benchmarks/results/quality.jsonl` has the command that makes its run again, its seed, rate, "
        "rows, hits, seconds, precision and threads.",
    ]
