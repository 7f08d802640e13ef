"""``docs/results.md``: what was measured, and who wins, ties and loses by it."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.study.data import ALL_ROWS, SUBSET_SEED
from benchmarks.study.markdown import NOTHING, number, paragraphs, points, rate, ratio, table
from benchmarks.study.plan import PARTS, REINIT_TASKS, REINITIALISATIONS, TUNING_SEED, Config, Part, Size, Task
from benchmarks.study.results import Result, Results, compare, gain
from benchmarks.study.scoring import TITLES, lower_is_better

GENERATED = "<!-- Written by `python -m benchmarks.quality report` from benchmarks/results/quality.jsonl. -->"
PART_TITLES: dict[Part, str] = {
    "glue": "GLUE",
    "e2e": "E2E",
    "chat": "Chat",
    "images": "Images",
    "reinit": "Reinitialisation",
    "choices": "Ranks and targets",
}
#: What was aimed at: points of GLUE's average and of BLEU that UORA may lose to LoRA r=8, at what share of its numbers.
AIM_POINTS, AIM_SHARE = 1.0, 12


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
        *_reinitialisation(results),
        *_choices(results),
        *_rates(results),
        *_again(),
    )


def state(results: Results) -> str:
    """How much of the study is there, and what is missing."""
    done, known = results.count(lambda run: True)
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


# --- in short


def in_short(results: Results) -> list[str]:
    """The aims, where UORA wins, ties and loses, and what the reinitialisation brings."""
    aims = [_glue_aim(results), _vera_aim(results), _e2e_aim(results)]
    return ["\n".join(f"- {line}" for line in (*aims, _tally(results), reinit_sentence(results))), _versus(results)]


def _glue_aim(results: Results) -> str:
    tasks = results.study.in_part("glue")
    uora, lora = _named(results, tasks[0], "uora"), _named(results, tasks[0], "lora")
    ours, theirs = results.average(tasks, uora), results.average(tasks, lora)
    if ours is None or theirs is None:
        return f"GLUE, {uora.label} against {lora.label}: not measured yet."
    numbers = [_complete(results, tasks[0], config).trainable_parameters for config in (uora, lora)]
    lost, share = gain("accuracy", theirs, ours), numbers[1] / numbers[0]
    met = [lost <= AIM_POINTS, share >= AIM_SHARE]
    verdict = "met" if all(met) else f"missed by {lost - AIM_POINTS:.1f} points" if met[1] else "missed by its size"
    return (
        f"GLUE, average of {len(tasks)} tasks: {uora.label} has {ours.text(1)}, {lora.label} {theirs.text(1)} "
        f"({points(-lost)} points), with {numbers[0]:,} trained numbers against {numbers[1]:,} (1/{share:.1f}). The aim, "
        f"at most {AIM_POINTS:g} point less with 1/{AIM_SHARE} of the numbers: **{verdict}**."
    )


def _vera_aim(results: Results) -> str:
    tasks = results.study.in_part("glue")
    uora, vera = _named(results, tasks[0], "uora"), _named(results, tasks[0], "vera")
    ours, theirs = results.average(tasks, uora), results.average(tasks, vera)
    if ours is None or theirs is None:
        return f"GLUE, {uora.label} against {vera.label}: not measured yet."
    over = gain("accuracy", ours, theirs)
    verdict = "met" if over >= 0 else f"missed by {-over:.1f} points"
    judged = compare("accuracy", ours, theirs)
    spread = f" ({judged} by the spread over seeds)" if judged else ""
    return (
        f"GLUE at equal rank: {uora.label} has {ours.text(1)}, {vera.label} {theirs.text(1)}{spread}. The aim, not "
        f"below VeRA: **{verdict}**."
    )


def _e2e_aim(results: Results) -> str:
    (task,) = results.study.in_part("e2e")
    uora, lora = results.study.main(task), _named(results, task, "lora")
    ours, theirs = results.complete(task, uora), results.complete(task, lora)
    if ours is None or theirs is None:
        return f"E2E, {uora.label} against {lora.label}: not measured yet."
    lost = gain(task.metric, theirs.mean, ours.mean)
    verdict = "met" if lost <= AIM_POINTS else f"missed by {lost - AIM_POINTS:.1f} BLEU"
    share = ratio(theirs.trainable_parameters, ours.trainable_parameters)
    return (
        f"E2E: {uora.label} has {ours.mean.text(1)} BLEU, {lora.label} {theirs.mean.text(1)} ({points(-lost)}), with "
        f"1/{share} of the trained numbers. The aim, at most {AIM_POINTS:g} BLEU less: **{verdict}**."
    )


def _tally(results: Results) -> str:
    """UORA against every other configuration of the main tables."""
    counted = {"wins": 0, "ties": 0, "loses": 0}
    for task in results.study.tasks:
        for config in results.study.configs(task):
            verdict = _verdict(results, task, config)
            if config.method != "none" and verdict is not None:
                counted[verdict] += 1
    if not sum(counted.values()):
        return "Wins, ties and losses: none can be told yet."
    return (
        f"UORA at rank {results.study.main(results.study.tasks[0]).r} against every other row of the tables: it wins "
        f"{counted['wins']} times, ties {counted['ties']} times and loses {counted['loses']} times. A difference "
        "counts where it is larger than both spreads over seeds together (the root of the sum of their squares)."
    )


def _verdict(results: Results, task: Task, config: Config) -> str | None:
    main = results.study.main(task)
    ours, theirs = results.complete(task, main), results.complete(task, config)
    if config == main or ours is None or theirs is None:
        return None
    return compare(task.metric, ours.mean, theirs.mean)


def _versus(results: Results) -> str:
    """A table of UORA against the methods that every task has."""
    others: list[str] = []
    for task in results.study.tasks:
        others += [config.label for config in results.study.configs(task) if config.label not in others]
    main = results.study.main(results.study.tasks[0]).label
    rows = [
        [label, *(_against(results, task, label) for task in results.study.tasks)]
        for label in others
        if label not in (main, "none")
    ]
    head = [f"{main} against", *(task.title for task in results.study.tasks)]
    return table(head, rows) + "\n\nPositive differences are in favour of UORA, also of the loss."


def _against(results: Results, task: Task, label: str) -> str:
    config = next((each for each in results.study.configs(task) if each.label == label), None)
    if config is None:
        return NOTHING
    verdict = _verdict(results, task, config)
    if verdict is None:
        return "?"
    ours, theirs = (_complete(results, task, each) for each in (results.study.main(task), config))
    return f"{verdict} {points(gain(task.metric, ours.mean, theirs.mean), _digits(task) + 1)}"


def reinit_sentence(results: Results) -> str:
    """What hits bring, over all that was measured."""
    judged: list[tuple[str, float, str]] = []
    for task, result in _reinit_results(results):
        control = results.complete(task, _control(results, task))
        if control is not None and result.complete and result.hits.value > 0:
            verdict = compare(task.metric, result.mean, control.mean)
            if verdict is not None:
                judged.append(
                    (verdict, gain(task.metric, result.mean, control.mean), f"{task.title} {result.config.label}")
                )
    if not judged:
        return "The reinitialisation: not measured yet."
    better = [what for verdict, _, what in judged if verdict == "wins"]
    worse = [what for verdict, _, what in judged if verdict == "loses"]
    mean = sum(difference for _, difference, _ in judged) / len(judged)
    outcome = "**It brings nothing that the seeds' spread would not explain.**"
    if better or worse:
        outcome = f"Better than without: {', '.join(better) or 'none'}. Worse: {', '.join(worse) or 'none'}."
    return (
        f"The reinitialisation: of {len(judged)} settings with hits, {len(better)} beat the control without it, "
        f"{len(judged) - len(better) - len(worse)} tie and {len(worse)} lose; on average {points(mean, 2)} points. {outcome}"
    )


# --- what was run


def _what(results: Results) -> list[str]:
    rows = [
        [
            task.title,
            task.base,
            _amount(task, task.size),
            number(task.size.test) if task.size.test else "all",
            str(task.batch),
            ", ".join(map(str, task.seeds)),
            f"{_amount(task, task.tuning)}; {task.tuning.test} held out",
            TITLES[task.metric],
        ]
        for task in results.study.tasks
    ]
    header = ["data", "base model", "trained on", "scored", "batch", "seeds", "tuned on", "metric"]
    machines = sorted({f"{line.machine}, {line.threads} threads, {line.dtype}" for line in results.lines.all()})
    return [
        table(header, rows, words=len(header)),
        f"Subsets are the first rows of the official train set in the order of seed {SUBSET_SEED}; GLUE is scored on the "
        "official dev set, E2E on meanings of its test set with all their references (it is trained on its dev set). "
        "Learning rates are tuned for each task, method, rank and targets on rows held out of train, with seed "
        f"{TUNING_SEED}, up and down 1, 3, 10, ... until the best has a worse one on each side or three steps are made; "
        "never on what is scored. AdamW, linear decay, warm-up over 6 % of the steps; heads at 0.001. Scores are times "
        "100, with the standard deviation over seeds. Trained numbers are without the head; stored bytes are with it, "
        "in float32. Seconds are those of training steps and compare only within a machine.",
        f"Measured on: {'; '.join(machines)}." if machines else "",
    ]


def _amount(task: Task, size: Size) -> str:
    rows = f"{size.train:,}" if size.train else f"all {ALL_ROWS[task.name]:,}"
    return f"{rows} rows, {size.epochs} epoch{'s' if size.epochs > 1 else ''}"


# --- the main tables


def _part(results: Results, part: Part) -> list[str]:
    tasks = results.study.in_part(part)
    title, body = f"## {PART_TITLES[part]}", main_table(results, tasks)
    missing = "" if body else "Not measured yet."
    return [title, body, missing, f"![{PART_TITLES[part]}: score by learning rate](images/rates-{part}.svg)"]


def main_table(results: Results, tasks: Sequence[Task]) -> str:
    """Rows of methods; empty if nothing is there."""
    configs = results.study.configs(tasks[0])
    rows = [_main_row(results, tasks, config) for config in configs if _some(results, tasks, config)]
    if not rows:
        return ""
    scores = [f"{task.title} ({TITLES[task.metric]})" for task in tasks]
    average = ["average"] if len(tasks) > 1 else []
    unit = "images" if tasks[0].part == "images" else "tokens"
    more = [name.replace("rouge_l", "ROUGE-L").replace("nist", "NIST") for name in _more(tasks)]
    return table(
        ["method", *scores, *more, *average, "trained numbers", "stored bytes", f"seconds per 1,000 {unit}"], rows
    )


def _more(tasks: Sequence[Task]) -> list[str]:
    return ["rouge_l", "nist"] if tasks[0].metric == "bleu" else []


def _some(results: Results, tasks: Sequence[Task], config: Config) -> list[Result]:
    return [found for task in tasks if (found := results.find(task, config)) is not None]


def _main_row(results: Results, tasks: Sequence[Task], config: Config) -> list[str]:
    found = [results.find(task, config) for task in tasks]
    some = [each for each in found if each is not None]
    seconds = [each.seconds_per_thousand for each in some if each.seconds_per_thousand is not None]
    mean = results.average(tasks, config)
    average = [mean.text(1) if mean else NOTHING] if len(tasks) > 1 else []
    return [
        _shown(config),
        *(_score(each) for each in found),
        *(some[0].other(name).text(2 if name == "nist" else 1) for name in _more(tasks)),
        *average,
        number(some[0].trainable_parameters),
        number(max(each.stored_bytes for each in some)),
        number(sum(seconds) / len(seconds), 2) if seconds else NOTHING,
    ]


_SHOWN = {"full": "full fine-tuning", "head": "head only", "none": "untrained"}


def _shown(config: Config) -> str:
    return _SHOWN.get(config.method, config.label)


def _score(result: Result | None) -> str:
    if result is None:
        return NOTHING
    marked = "" if result.complete else f" ({len(result.lines)} of {result.planned} seeds)"
    return result.mean.text(_digits(result.task)) + marked


def _digits(task: Task) -> int:
    return 3 if lower_is_better(task.metric) else 1


# --- reinitialisation


def _control(results: Results, task: Task) -> Config:
    return _with(results.study.main(task), (("tau", 0.0),))


def _with(config: Config, settings: tuple[tuple[str, str | int | float], ...]) -> Config:
    return Config(config.method, config.r, config.targets, settings)


def _reinit_results(results: Results) -> list[tuple[Task, Result]]:
    """Everything but the control."""
    found = []
    for task in (task for task in results.study.tasks if task.name in REINIT_TASKS):
        main = results.study.main(task)
        for settings in ((), *REINITIALISATIONS[1:]):
            result = results.find(task, _with(main, settings))
            if result is not None:
                found.append((task, result))
    return found


def _reinitialisation(results: Results) -> list[str]:
    tasks = [task for task in results.study.tasks if task.name in REINIT_TASKS]
    rows = []
    for settings in (REINITIALISATIONS[0], (), *REINITIALISATIONS[1:]):
        cells = [cell for task in tasks for cell in _reinit_cells(results, task, settings)]
        if any(cell != NOTHING for cell in cells):
            rows.append([_setting(settings), *cells])
    body = table(["setting", *(head for task in tasks for head in (f"{task.title} hits", task.title))], rows)
    return [
        "## Reinitialisation",
        body if rows else "Not measured yet.",
        "Hits are the mean of a job. Each cell has the score, and its difference from the control without "
        "reinitialisation (`tau` 0, the first row) with what it amounts to by the spread over seeds. A job without hits "
        "is the control, number by number." if rows else "",
        "![Hits of a job and what they change](images/reinitialisation.svg)",
    ]  # fmt: skip


def _setting(settings: tuple[tuple[str, str | int | float], ...]) -> str:
    if not settings:
        return "`tau=1e-05` (default)"
    return " ".join(f"`{name}={value}`" for name, value in settings)


def _reinit_cells(results: Results, task: Task, settings: tuple[tuple[str, str | int | float], ...]) -> list[str]:
    config, control = _with(results.study.main(task), settings), results.complete(task, _control(results, task))
    result = results.find(task, config)
    if result is None:
        return [NOTHING, NOTHING]
    text = _score(result)
    if result.complete and control is not None and config != control.config:
        verdict = compare(task.metric, result.mean, control.mean)
        text += f" ({points(gain(task.metric, result.mean, control.mean))}{f', {verdict}' if verdict else ''})"
    return [number(result.hits.value, 1), text]


# --- ranks, targets, rates


def _choices(results: Results) -> list[str]:
    body = choices_table(results)
    return ["## Ranks and targets", body or "Not measured yet."]


def choices_table(results: Results) -> str:
    """Other ranks and targets beside the main rows; empty if nothing is there."""
    tasks = [task for task in results.study.tasks if any(run.part == "choices" for run in _runs_on(results, task))]
    if not tasks:
        return ""
    first = tasks[0]
    configs = [results.study.main(first), _named(results, first, "lora"), *results.study.choices()]
    rows = [
        [f"{config.label}, {config.targets}", *_main_row(results, tasks, config)[1:]]
        for config in configs
        if _some(results, tasks, config)
    ]
    header = ["method, targets", *(task.title for task in tasks), "average", "trained numbers", "stored bytes"]
    return table([*header, "seconds per 1,000 tokens"], rows) if rows else ""


def _runs_on(results: Results, task: Task) -> list[object]:
    return [run for run in results.planned.runs if run.task == task]


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
                scores = ", ".join(f"{rate(line.learning_rate)}: {line.score:.{_digits(task)}f}" for line in tried)
                rows.append(
                    [task.title, config.tuned.label + where, rate(final.learning_rate) if final else NOTHING, scores]
                )
    body = table(["data", "method", "taken", "tried, with the score on held-out rows of train"], rows, words=4)
    return ["## Learning rates", body if rows else "Not measured yet."]


def _again() -> list[str]:
    return [
        "## Again",
        "```sh\npython -m benchmarks.quality --list     # what is missing, and about how long it takes\n"
        "python -m benchmarks.quality            # makes it; can be stopped and started again\n"
        "python -m benchmarks.quality report     # writes this page\n```",
        "Each line of `benchmarks/results/quality.jsonl` has the command that makes its run again, its seed, rate, rows, "
        "hits, seconds, precision and threads.",
    ]


def _named(results: Results, task: Task, method: str) -> Config:
    """The row of a main table."""
    return next(each for each in results.study.configs(task) if each.method == method)


def _complete(results: Results, task: Task, config: Config) -> Result:
    found = results.complete(task, config)
    assert found is not None  # noqa: S101 # as the caller has seen
    return found
