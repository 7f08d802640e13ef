"""The study's plan, data, scores and report. What it runs is tested in its short form (``tests/e2e``)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.study import choosing, data, findings, hits, report, tiny_data
from benchmarks.study.bases import Bases
from benchmarks.study.lines import Line, Lines
from benchmarks.study.plan import (
    FIRST_RATES,
    HEAD,
    HEAD_RATE,
    HEAD_RATES,
    HEAD_TASKS,
    NONE,
    PARTS,
    TASKS,
    Config,
    Run,
    Study,
    plan,
    rung,
    tune,
)
from benchmarks.study.results import Mean, Results, compare, gain
from benchmarks.study.running import Runner
from benchmarks.study.scoring import score_labels, score_texts
from benchmarks.study.session import Session
from uora.data import CompletionRow, ImageRow, TextRow
from worker.up import ROOT

Score = Callable[[Run], float]
COMMITTED = ROOT / "benchmarks" / "results" / "quality.jsonl"
BYTES = {"uora": 30_000, "vera": 31_000, "osora": 30_500, "lora": 300_000, "olora": 600_000}


def line(run: Run, score: float) -> Line:
    """A run's line with an invented score."""
    method = run.config.method
    return Line(
        key=run.key, part=run.part, task=run.task.name, base=run.task.base, method=method, r=run.config.r,
        targets=run.config.targets, settings=dict(run.config.settings), purpose=run.purpose, seed=run.seed,
        learning_rate=run.learning_rate, head_learning_rate=run.head_rate,
        epochs=run.size.epochs, batch=run.task.batch, rows=100, test_rows=50,
        metric=run.metric, score=score, scores={run.metric: score, "rouge_l": 60.0, "nist": 4.0},
        trainable_parameters=5_376 if method == "uora" else 73_728, head_parameters=770,
        stored_bytes=BYTES.get(method, 90_000_000) + (run.config.r or 0), seconds=10.0, total_seconds=12.0,
        tokens=5_000, steps=20, hits=4 if run.config.settings == (("tau", 1e-3),) else 0, dtype="float32", threads=2,
        machine="a processor, 2 cores", command="python -m benchmarks.quality --run ...",
    )  # fmt: skip


def filled(score: Score, study: Study | None = None) -> Results:
    """A whole study whose runs score as ``score`` says."""
    study, lines = study or Study(), Lines()
    while missing := [run for run in plan(study, lines).runs if lines.find(run.key) is None]:
        for run in missing:
            lines.add(line(run, score(run)))
    return Results(study, lines)


def by_method(**points: float) -> Score:
    """70, and so much more for a method; seeds differ by half a point; a loss is the better the lower."""

    def score(run: Run) -> float:
        if run.purpose == "tune":  # the first rate is the best
            return -abs(run.learning_rate - _first(run)) * (-1 if run.metric == "loss" else 1)
        over = points.get(run.config.method, -20.0 if run.config == NONE else 0.0)
        return 70.0 + (-over if run.task.metric == "loss" else over) + 0.5 * run.seed

    return score


def _first(run: Run) -> float:
    return FIRST_RATES[run.config.method]


# --- the plan


def test_keys_are_of_one_run_each_and_name_what_matters() -> None:
    results = filled(by_method())
    runs = results.planned.runs
    assert len({run.key for run in runs}) == len(runs)
    assert {run.part for run in runs} == set(PARTS)
    run = runs[0]
    for other in (
        replace(run, seed=7),
        replace(run, learning_rate=0.5),
        replace(run, head_rate=0.5),
        replace(run, purpose="test"),
        replace(run, config=replace(run.config, settings=(("tau", 0.5),))),
        replace(run, config=replace(run.config, targets="all-linear")),
        replace(run, task=replace(run.task, batch=9)),
        replace(run, task=replace(run.task, tuning=replace(run.task.tuning, epochs=9))),
    ):
        assert other.key != run.key


def test_every_table_has_three_seeds_of_the_small_tasks() -> None:
    results = filled(by_method())
    for task in results.study.in_part("glue"):
        for config in results.study.configs(task):
            found = results.complete(task, config)
            assert found is not None
            assert len(found.lines) >= (1 if config == NONE else 3)


@pytest.mark.parametrize(
    ("first", "steps", "expected"), [(1e-3, 1, 3e-3), (3e-2, 1, 0.1), (3e-4, -2, 3e-5), (1e-2, 0, 1e-2)]
)
def test_the_ladder_of_rates(first: float, steps: int, expected: float) -> None:
    assert rung(first, steps) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("best", "tried", "taken"),
    [(1e-3, 5, 1e-3), (1e-2, 7, 1e-2), (2e-3, 6, 2e-3), (5e-4, 6, 5e-4), (1.0, 6, 3e-2), (1e-9, 6, 3e-5)],
    ids=["in the middle", "beyond the edge", "above", "below", "never enough", "never little enough"],
)
def test_tuning_goes_on_until_the_best_rate_has_worse_ones_beside_it(
    monkeypatch: pytest.MonkeyPatch, best: float, tried: int, taken: float
) -> None:
    monkeypatch.setitem(FIRST_RATES, "lora", 1e-3)
    study, lines = Study(), Lines()
    task, config = study.task("sst2"), Config("lora", 8, "q,v")
    rate: float | None = None
    while rate is None:
        runs, rate = tune(study, task, config, lines, part="glue")
        for run in runs:
            distance = max(run.learning_rate / best, best / run.learning_rate)
            if lines.find(run.key) is None:
                lines.add(line(run, -distance))
    assert (len(runs), rate) == (tried, pytest.approx(taken))
    assert {run.purpose for run in runs} == {"tune"}


def test_heads_have_one_rate_beside_whatever_is_trained() -> None:
    runs = [run for run in filled(by_method()).planned.runs if run.purpose != "head"]
    beside = {run.head_rate for run in runs if run.task.has_head and run.config not in (HEAD, NONE)}
    elsewhere = {run.head_rate for run in runs if not run.task.has_head or run.config in (HEAD, NONE)}
    assert (beside, elsewhere) == ({HEAD_RATE}, {None})


def test_other_rates_of_the_head_are_looked_at_beside_the_tuned_adapter() -> None:
    results = filled(by_method())
    for name in HEAD_TASKS:
        task = results.study.task(name)
        heads = results.heads(task)
        assert tuple(line.head_learning_rate for line in heads) == HEAD_RATES
        assert {line.learning_rate for line in heads} == {FIRST_RATES["uora"]}
        tuned = results.tuning(task, results.study.main(task))
        assert {line.head_learning_rate for line in tuned} == {HEAD_RATE}


def test_a_task_without_a_tuning_takes_the_rates_of_another() -> None:
    plain = by_method()

    def faster(run: Run) -> float:
        if (run.task.name, run.config.method, run.purpose) == ("sst2", "lora", "tune"):
            return -abs(run.learning_rate - 1e-2)
        return plain(run)

    runs = filled(faster).planned.runs
    rates = {run.task.name: run.learning_rate for run in runs if run.config.method == "lora" and run.purpose == "test"}
    assert {name for name, rate in rates.items() if rate == 1e-2} == {"sst2", "cola"}
    assert {run.task.name for run in runs if run.purpose == "tune" and run.task.part == "glue"} == {"sst2", "stsb"}


def test_settings_of_the_reinitialisation_take_the_rate_of_the_default() -> None:
    results = filled(by_method())
    rates = {
        (line.method, line.r, line.targets): line.learning_rate
        for line in results.lines.all()
        if line.task == "rte" and line.purpose == "test"
    }
    assert len(rates) < len([line for line in results.lines.all() if line.task == "rte" and line.seed == 0])
    for run in results.planned.runs:
        if run.part == "reinit" and run.task.name == "rte":
            assert run.learning_rate == rates[run.config.method, run.config.r, run.config.targets]


def test_equal_rates_are_told_apart_by_what_is_usual() -> None:
    study, lines = Study(), Lines()
    task, config = study.task("sst2"), Config("lora", 8, "q,v")
    rate: float | None = None
    while rate is None:
        runs, rate = tune(study, task, config, lines, part="glue")
        for run in runs:
            lines.add(line(run, 50.0))
    assert rate == FIRST_RATES["lora"]


# --- the runs


def test_the_commonest_class_needs_no_training(tmp_path: Path) -> None:
    study = Study.smoke()
    session = Session(study, Lines(), Runner(Bases(tiny_data.write(tmp_path), tiny_in=tmp_path)))
    runs = [run for run in session.plan(frozenset()).runs if run.config == NONE and run.task.has_head]
    scores = {run.task.name: line.score for run in runs for line in session.make([run])}
    assert scores.keys() == {task.name for task in study.tasks if task.has_head}
    assert (scores["cola"], scores["stsb"]) == (0.0, 0.0)
    assert 0 < scores["sst2"] <= 100


def test_runs_that_share_a_training_come_to_what_they_come_to_alone(tmp_path: Path) -> None:
    """Rates of a ladder at once; a method that cannot share is trained alone."""
    places = tiny_data.write(tmp_path)
    study = Study.smoke()
    task = study.task("chitchat")
    session = Session(study, Lines(), Runner(Bases(places, tiny_in=tmp_path)))
    runs, _ = tune(Study((task,)), task, study.main(task), Lines(), part="chat")
    assert session.first_of(runs) == runs
    together = session.make(runs)
    alone = [each for run in runs for each in session.make([run])]
    assert [each.score for each in together] == pytest.approx([each.score for each in alone], rel=1e-3)
    assert {each.together for each in together} == {3}
    assert {each.together for each in alone} == {1}
    assert [each.key for each in together] == [run.key for run in runs]
    assert len({each.score for each in together}) == 3
    others, _ = tune(Study((task,)), task, Config("lora", 8, "all-linear"), Lines(), part="chat")
    assert session.first_of(others) == others[:1]


# --- lines


def test_a_cut_off_last_line_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "quality.jsonl"
    runs = plan(Study(), Lines()).runs[:2]
    whole = json.dumps(asdict(line(runs[0], 1.0))) + "\n"
    path.write_text(whole + json.dumps(asdict(line(runs[1], 2.0)))[:40])
    lines = Lines.read(path)
    assert [lines.find(run.key) is not None for run in runs] == [True, False]
    lines.add(line(runs[1], 2.0))
    assert [each.score for each in Lines.read(path).all()] == [1.0, 2.0]


def test_a_line_of_something_else_is_named(tmp_path: Path) -> None:
    path = tmp_path / "quality.jsonl"
    path.write_text('{"key": "a"}\n')
    with pytest.raises(ValueError, match=r"quality.jsonl, line 1: .*Expected an object with key, part"):
        Lines.read(path)


# --- data


@pytest.mark.parametrize("task", [task.name for task in TASKS])
def test_tuning_sees_nothing_of_what_is_scored(task: str, tmp_path: Path) -> None:
    places = tiny_data.write(tmp_path)
    final = data.final_split(task, places, train=None, test=None)
    tuned = data.tune_split(task, places, train=8, held_out=6)
    assert list(tuned.train) == list(final.train[:8])
    assert list(tuned.test) == list(final.train[-6:])
    assert not {row.line for row in tuned.train} & {row.line for row in tuned.test}
    assert data.final_split(task, places, train=8, test=6) == data.final_split(task, places, train=8, test=6)


def test_glue_is_read_as_it_is_written(tmp_path: Path) -> None:
    """No quoting, a mark at the file's begin, lines without a header, numbers as labels."""
    places = tiny_data.write(tmp_path)
    mrpc = data.final_split("mrpc", places, train=None, test=None)
    assert len(mrpc.test) == tiny_data.ROWS
    first = mrpc.test[0]
    assert isinstance(first, TextRow)
    assert (first.text, first.text_pair, first.label) == ('"pear', "pear", "0")
    assert len(data.final_split("cola", places, train=None, test=None).test) == tiny_data.ROWS
    stsb = data.final_split("stsb", places, train=None, test=None).test[1]
    assert isinstance(stsb, TextRow)
    assert stsb.label == 1.0


def test_every_reference_of_a_meaning_is_kept(tmp_path: Path) -> None:
    places = tiny_data.write(tmp_path)
    file = places.data / "e2e" / "testset_w_refs.csv"
    file.write_text('mr,ref\n"a[1]",one\n"b[2]",two\n"a[1]",uno\n')
    split = data.final_split("e2e", places, train=None, test=None)
    assert sorted(map(sorted, split.references)) == [["one", "uno"], ["two"]]


def test_what_is_held_out_asks_for_nothing_that_was_trained(tmp_path: Path) -> None:
    places = tiny_data.write(tmp_path)
    (places.data / "e2e" / "devset.csv").write_text("mr,ref\n" + "".join(f"a[{i % 5}],one {i}\n" for i in range(20)))
    tuned = data.tune_split("e2e", places, train=2, held_out=4)
    prompts = [{row.prompt for row in rows if isinstance(row, CompletionRow)} for rows in (tuned.train, tuned.test)]
    assert len(tuned.test) == len(tuned.references) == 4
    assert not prompts[0] & prompts[1]


def test_images_keep_their_classes(tmp_path: Path) -> None:
    row = data.final_split("fashion", tiny_data.write(tmp_path), train=1, test=1).train[0]
    assert isinstance(row, ImageRow)
    import io

    from PIL import Image

    grey = Image.open(io.BytesIO(row.image)).convert("L").getpixel((0, 0))
    assert data.FASHION_CLASSES[grey // 25] == row.label


def test_missing_data_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"glue/ and e2e/ with --data"):
        data.final_split("rte", data.Places(tmp_path, tmp_path), train=1, test=1)


# --- scores


def test_glue_metrics() -> None:
    expected = ["1", "1", "0", "0"]
    assert score_labels("accuracy", ["1", "0", "0", "0"], expected) == {"accuracy": 75.0}
    both = score_labels("accuracy_f1", ["1", "0", "0", "0"], expected)
    assert both["f1"] == pytest.approx(200 / 3)
    assert both["accuracy_f1"] == pytest.approx((75 + 200 / 3) / 2)
    assert score_labels("matthews", ["1", "1", "1", "1"], expected)["matthews"] == 0.0
    numbers = score_labels("pearson_spearman", [1.0, 2.0, 9.0], [1.0, 2.0, 3.0])
    assert numbers["spearman"] == pytest.approx(100.0)
    assert numbers["pearson"] < 95
    assert score_labels("pearson_spearman", [1.0, 1.0], [1.0, 2.0])["pearson_spearman"] == 0.0


def test_texts_are_scored_against_their_nearest_reference() -> None:
    said = "the mill is a pub near the river in the city"
    others = ["somewhere one can eat", said]
    right = score_texts([said, said], [others, [said]])
    assert right["bleu"] == pytest.approx(100.0)
    assert right["rouge_l"] == pytest.approx(100.0)
    assert right["nist"] > 1
    wrong = score_texts([said, said], [others[:1], others[:1]])
    assert wrong["bleu"] < 5
    assert wrong["rouge_l"] == 0.0


# --- verdicts


def test_a_difference_counts_beyond_both_spreads() -> None:
    low, high = Mean(70.0, 1.0), Mean(71.5, 1.0)
    assert compare("accuracy", high, low) == "wins"
    assert compare("accuracy", low, high) == "loses"
    assert compare("accuracy", Mean(71.4, 1.0), low) == "ties"
    assert compare("loss", high, low) == "loses"
    assert gain("loss", Mean(2.0, None), Mean(3.0, None)) == 1.0
    assert compare("accuracy", high, Mean(60.0, None)) is None


@pytest.mark.parametrize(
    ("points", "aims", "against_lora"),
    [
        ({}, ["met", "met", "met"], "ties"),
        ({"uora": 5.0}, ["met", "met", "met"], "wins"),
        ({"lora": 3.0, "vera": 2.0}, ["missed by 2.0 points", "missed by 2.0 points", "missed by 2.0 BLEU"], "loses"),
    ],
)
def test_words_follow_from_numbers(points: dict[str, float], aims: list[str], against_lora: str) -> None:
    page = findings.page(filled(by_method(**points)))
    assert page.count("runs of the study are there.") == 1
    short = page[page.index("## In short") : page.index("## What was run")].splitlines()
    stated = [line for line in short if line.startswith("- ")]
    assert [aim in line for aim, line in zip(aims, stated, strict=False)] == [True] * 3
    (row,) = [line for line in short if line.startswith("| lora r=8 ")]
    assert row.count(against_lora) == len(TASKS)
    assert "not measured yet" not in page.lower()


def test_a_task_of_which_nothing_was_learned_is_named() -> None:
    plain = by_method()

    def hard(run: Run) -> float:
        if run.task.name == "cola" and run.config in (NONE, HEAD):
            return 90.0 if run.config == HEAD else 70.5
        return plain(run)

    usual, odd = (findings.page(filled(score)) for score in (plain, hard))
    assert "nothing is learned" not in usual
    assert "its spread over seeds on CoLA (of the other rows: head only). With so few" in odd


def test_what_the_reinitialisation_brings() -> None:
    plain = by_method()

    def helped(run: Run) -> float:
        return plain(run) + (3.0 if run.config.settings == (("tau", 1e-3),) and run.task.name == "rte" else 0.0)

    nothing, better = (hits.sentence(filled(score)) for score in (plain, helped))
    assert "0 beat the control" in nothing
    assert "brings nothing" in nothing
    assert "1 beat the control" in better
    assert "RTE with `tau=0.001`" in better
    assert "brings nothing" not in better


def test_tasks_of_which_nothing_is_learned_say_nothing_of_the_reinitialisation() -> None:
    plain = by_method()

    def hard(run: Run) -> float:
        return 60.0 if run.task.name == "rte" else plain(run)

    usual, odd = (hits.sentence(filled(score)) for score in (plain, hard))
    assert "Not counted" not in usual
    assert odd.endswith("Not counted, since no adapter learns anything there: RTE.")


def test_a_missing_seed_is_said_and_nothing_is_concluded() -> None:
    whole = filled(by_method())
    lacking = [each for each in whole.lines.all() if not (each.method == "lora" and each.seed == 2)]
    results = Results(whole.study, Lines.of(lacking))
    page = findings.page(results)
    assert "**Incomplete:" in page
    assert "(2 of 3 seeds)" in page
    assert "GLUE, uora r=64 against lora r=8: not measured yet." in page
    assert "| texts or pairs of texts with a class or a number | not measured yet |" in choosing.page(results)


def test_the_smallest_that_ties_is_advised() -> None:
    tie = choosing.candidates(filled(by_method(lora=0.3)), "glue")
    assert choosing.best(tie, "accuracy").config.method == "lora"
    assert choosing.cheapest(tie, "accuracy").config.method == "uora"
    assert [each.config.method for each in choosing.as_good(tie, "accuracy")] == [
        "uora", "osora", "vera", "lora", "olora",
    ]  # fmt: skip
    worse = choosing.candidates(filled(by_method(lora=9.0)), "glue")
    assert choosing.cheapest(worse, "accuracy").config.method == "lora"
    loss = choosing.candidates(filled(by_method(osora=9.0)), "chat")
    assert choosing.cheapest(loss, "loss").config.method == "osora"


def test_a_default_is_told_with_what_it_loses() -> None:
    """VeRA's first rate, 0.1, is made the best; its default, 0.05, was tried beside it."""
    row = next(line for line in choosing.page(filled(by_method())).splitlines() if line.startswith("| vera | 0.05 |"))
    assert row.count("0.1 (-0.1)") == 3  # accuracy, correlation, accuracy
    assert row.count("0.1 (-0.050)") == 2  # loss of E2E and chat


# --- the pages


def test_a_whole_study_leaves_no_plot_empty_and_every_plot_is_shown(tmp_path: Path) -> None:
    written = report.write(filled(by_method(lora=1.0)).lines, tmp_path)
    pages = "".join(path.read_text() for path in written if path.suffix == ".md")
    for image in [path for path in written if path.suffix == ".svg"]:
        assert f"(images/{image.name})" in pages
        assert "not measured yet" not in image.read_text()


def test_the_committed_pages_are_those_of_the_committed_lines(tmp_path: Path) -> None:
    """To the last byte, plots too."""
    for path in report.write(Lines.read(COMMITTED), tmp_path):
        committed = ROOT / "docs" / path.relative_to(tmp_path)
        assert committed.read_text() == path.read_text(), f"{committed}: run python -m benchmarks.quality report"
