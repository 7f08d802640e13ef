"""Where UORA wins, ties and loses, and whether it is what was aimed at."""

from __future__ import annotations

from benchmarks.study.hits import sentence
from benchmarks.study.markdown import NOTHING, points, ratio, table
from benchmarks.study.plan import NONE, TARGETS_TASKS, Config, Task
from benchmarks.study.results import Results, compare, gain
from benchmarks.study.tables import complete, digits, named, shown

#: What was aimed at: points of GLUE's average and of BLEU that UORA may lose to LoRA r=8, at what share of its numbers.
AIM_POINTS, AIM_SHARE = 1.0, 12


def in_short(results: Results) -> list[str]:
    """The aims, where UORA wins, ties and loses, and what the reinitialisation brings."""
    aims = [_glue_aim(results), _vera_aim(results), _e2e_aim(results)]
    said = (*aims, *_wide(results), _tally(results), *_unlearned(results), sentence(results))
    return ["\n".join(f"- {line}" for line in said), _versus(results)]


def _glue_aim(results: Results) -> str:
    tasks = results.study.in_part("glue")
    uora, lora = named(results, tasks[0], "uora"), named(results, tasks[0], "lora")
    ours, theirs = results.average(tasks, uora), results.average(tasks, lora)
    if ours is None or theirs is None:
        return f"GLUE, {uora.label} against {lora.label}: not measured yet."
    numbers = [complete(results, tasks[0], config).trainable_parameters for config in (uora, lora)]
    lost, share = gain("accuracy", theirs, ours), numbers[1] / numbers[0]
    missed = [f"by {lost - AIM_POINTS:.1f} points"] if lost > AIM_POINTS else []
    missed += ["by its size"] if share < AIM_SHARE else []
    verdict = f"missed {' and '.join(missed)}" if missed else "met"
    return (
        f"GLUE, average of {len(tasks)} tasks: {uora.label} has {ours.text(1)}, {lora.label} {theirs.text(1)} "
        f"({points(-lost)} points), with {numbers[0]:,} trained numbers against {numbers[1]:,} (1/{share:.1f}). "
        f"The aim, at most {AIM_POINTS:g} point less with 1/{AIM_SHARE} of the numbers: **{verdict}**."
    )


def _vera_aim(results: Results) -> str:
    tasks = results.study.in_part("glue")
    uora, vera = named(results, tasks[0], "uora"), named(results, tasks[0], "vera")
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
    uora, lora = results.study.main(task), named(results, task, "lora")
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


def _wide(results: Results) -> list[str]:
    """UORA where the service puts it by default, beside LoRA where the tables have it."""
    tasks = [task for task in results.study.tasks if task.name in TARGETS_TASKS]
    wide, lora = results.study.wide(tasks[0]), named(results, tasks[0], "lora")
    ours, theirs = results.average(tasks, wide), results.average(tasks, lora)
    if ours is None or theirs is None:
        return []
    numbers = [complete(results, tasks[0], config).trainable_parameters for config in (wide, lora)]
    return [
        f"{wide.label} on all linear layers, the service's default, has {ours.text(1)} on average of "
        f"{' and '.join(task.title for task in tasks)} with {numbers[0]:,} numbers; {lora.label} on query and value "
        f"{theirs.text(1)} with {numbers[1]:,} (UORA {compare(tasks[0].metric, ours, theirs)} by the spread over "
        f"seeds). {lora.label} on all linear layers was not measured there."
    ]


def _tally(results: Results) -> str:
    """UORA against every other configuration of the main tables."""
    counted = {"wins": 0, "ties": 0, "loses": 0}
    for task in results.study.tasks:
        for config in results.study.configs(task):
            verdict = _verdict(results, task, config)
            if config != NONE and verdict is not None:
                counted[verdict] += 1
    if not sum(counted.values()):
        return "Wins, ties and losses: none can be told yet."
    return (
        f"UORA at rank {results.study.main(results.study.tasks[0]).r} against every other row of the tables: it wins "
        f"{counted['wins']} times, ties {counted['ties']} times and loses {counted['loses']} times. A difference "
        "counts where it is larger than both spreads over seeds together (the root of the sum of their squares); with "
        "three seeds about one in six pairs of equals differs by that rule, so read one win among many with care."
    )


def _unlearned(results: Results) -> list[str]:
    """Tasks of which no adapter learned anything."""
    said = []
    for task in results.study.tasks:
        if results.tells(task):
            continue
        above = results.above_commonest(task)
        others = f" (of the other rows: {', '.join(shown(task, config) for config in above)})" if above else ""
        said.append(f"{task.title}{others}")
    if not said:
        return []
    return [
        "No adapter is above always saying the commonest class by more than its spread over seeds on "
        f"{' and '.join(said)}. With so few rows nothing is learned there, and those columns do not tell methods apart."
    ]


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
    ours, theirs = (complete(results, task, each) for each in (results.study.main(task), config))
    return f"{verdict} {points(gain(task.metric, ours.mean, theirs.mean), digits(task.metric) + 1)}"
