"""``python -m worker.child`` as its parent sees it, on a real base model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.worker.support import BASE_MODEL, chat_rows
from uora.artifact import loads
from uora.spec import HyperparameterRequest, Hyperparameters, UoraSpec, resolve
from worker.child_process import COMMAND, child_environment
from worker.messages import (
    ChildRequest,
    Done,
    Evaluated,
    Failed,
    Report,
    Run,
    Started,
    State,
    Step,
    Stop,
    Stopped,
    parse_report,
)

Child = subprocess.Popen[str]


@pytest.fixture
def request_(tmp_path: Path, tiny_model: Path) -> ChildRequest:
    """Eight rows, two epochs of four steps."""
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(chat_rows(8))
    work_dir = tmp_path / "work"
    work_dir.mkdir()
    run = Run(
        spec=resolve(
            HyperparameterRequest(n_epochs=2, batch_size=2),
            adapter=UoraSpec(r=4),
            learning_rate=0.01,
            seed=1,
            n_examples=8,
        ),
        training_file=rows,
        validation_file=rows,
        resume=None,
        warm_start=None,
        work_dir=work_dir,
    )
    return ChildRequest(
        runs=(run,),
        base_model=BASE_MODEL,
        base_source=f"path:{tiny_model}",
        work_dir=work_dir,
        cache_dir=tmp_path / "cache",
        dtype="float32",
        torch_threads=1,
    )


@pytest.fixture
def child(request_: ChildRequest) -> Iterator[Child]:
    """A child that waits for its request."""
    with waiting_child(request_) as process:
        yield process


def of(request: ChildRequest, *changes: dict[str, Any]) -> ChildRequest:
    """A request for the run of ``request`` with each of these changes."""
    (run,) = request.runs
    return request.model_copy(update={"runs": tuple(run.model_copy(update=each) for each in changes)})


@contextmanager
def waiting_child(request_: ChildRequest) -> Iterator[Child]:
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        COMMAND,
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
        env=child_environment(),
        cwd=request_.work_dir,
        start_new_session=True,
    )
    yield process
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def tell(child: Child, request: ChildRequest) -> None:
    assert child.stdin is not None
    child.stdin.write(request.model_dump_json() + "\n")
    child.stdin.flush()


def reports(child: Child) -> list[Report]:
    """All reports; the whole of stdout must be reports."""
    assert child.stdout is not None
    return [parse_report(line) for line in child.stdout]


def test_a_whole_run(child: Child, request_: ChildRequest) -> None:
    tell(child, request_)
    said = [report for report in reports(child) if not isinstance(report, State)]

    assert child.wait(timeout=20) == 0
    assert [type(report) for report in said] == [Started, *[Step] * 4, Evaluated, *[Step] * 4, Evaluated, Done]
    started, steps, done = said[0], [report for report in said if isinstance(report, Step)], said[-1]
    assert isinstance(started, Started)
    assert started.total_steps == 8
    assert [step.step for step in steps] == list(range(1, 9))
    assert isinstance(done, Done)
    assert (done.steps, done.trained_tokens) == (8, steps[-1].trained_tokens)
    final = (request_.work_dir / done.file).read_bytes()
    for report in said:
        if isinstance(report, Evaluated):
            manifest = loads((request_.work_dir / report.file).read_bytes()).manifest
            assert manifest.base_model == BASE_MODEL
            assert report.metrics["valid_loss"] is not None
    assert loads(final).manifest.digest == manifest.digest


def test_an_unknown_error_is_hidden(child: Child, request_: ChildRequest, tmp_path: Path) -> None:
    folder = tmp_path / "hunter2"
    folder.mkdir()
    tell(child, of(request_, {"training_file": folder}))
    (report,) = reports(child)

    assert child.wait(timeout=20) == 0
    assert isinstance(report, Failed)
    assert (report.failure.code, report.failure.kind) == ("internal_error", "platform")
    assert "hunter2" not in report.model_dump_json()
    assert child.stderr is not None
    assert "hunter2" in child.stderr.read()


def test_a_bad_row_names_file_and_line(child: Child, request_: ChildRequest, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(chat_rows(2) + b"{}\n")
    tell(child, of(request_, {"validation_file": bad}))
    (report,) = reports(child)

    assert isinstance(report, Failed)
    assert (report.failure.code, report.failure.param) == ("missing_messages", "validation_file")
    assert report.failure.message.startswith("Line 3")


def test_it_leaves_with_its_parent_and_takes_its_folder_along(child: Child, request_: ChildRequest) -> None:
    with _stuck(child, request_):
        assert child.stdin is not None
        child.stdin.close()

        assert child.wait(timeout=5) != 0
        assert not request_.work_dir.exists()


def test_without_a_request_it_leaves(child: Child) -> None:
    assert child.stdin is not None
    child.stdin.close()
    assert child.wait(timeout=10) == 1


def test_a_run_that_was_stopped_goes_on_to_the_same_adapter(child: Child, request_: ChildRequest) -> None:
    hyperparameters = Hyperparameters(n_epochs=10, batch_size=2, learning_rate_multiplier=1.0)
    spec = request_.runs[0].spec.model_copy(update={"hyperparameters": hyperparameters})
    longer = of(request_, {"spec": spec})
    tell(child, longer)
    assert child.stdout is not None
    said: list[Report] = []
    for line in child.stdout:
        said.append(parse_report(line))
        if isinstance(said[-1], Step) and said[-1].step == 3:
            child.terminate()
    assert child.wait(timeout=20) == 0
    state, stopped = said[-2:]
    assert isinstance(state, State)
    assert isinstance(stopped, Stopped)
    assert 3 <= state.step < 40

    with waiting_child(longer) as second:
        tell(second, of(longer, {"resume": request_.work_dir / state.file}))
        rest = reports(second)
    with waiting_child(longer) as unbroken:
        tell(unbroken, longer)
        whole = reports(unbroken)
    steps = [report.step for report in (*said, *rest) if isinstance(report, Step)]
    assert steps == [*range(1, 41)]
    assert rest[-1] == whole[-1]  # the loss on the validation set, to the last digit


def test_a_warm_start_is_handed_on(child: Child, request_: ChildRequest) -> None:
    first_dir = request_.work_dir / "first"
    first_dir.mkdir()
    with waiting_child(request_) as first:
        tell(first, of(request_, {"work_dir": first_dir}))
        done = reports(first)[-1]
    assert isinstance(done, Done)
    tell(child, of(request_, {"warm_start": first_dir / done.file}))
    evaluated = [report for report in reports(child) if isinstance(report, Evaluated)]

    before, after = done.metrics["valid_loss"], evaluated[-1].metrics["valid_loss"]
    assert before is not None
    assert after is not None
    assert after < before


def several(request: ChildRequest, *changes: dict[str, Any]) -> ChildRequest:
    """As `of`, each run with a folder of its own."""
    folders = [request.work_dir / str(number) for number in range(len(changes))]
    for folder in folders:
        folder.mkdir()
    return of(request, *({"work_dir": folder} | each for folder, each in zip(folders, changes, strict=True)))


def test_several_runs_are_stopped_one_by_one_and_all_at_once(child: Child, request_: ChildRequest) -> None:
    hyperparameters = Hyperparameters(n_epochs=100, batch_size=2, learning_rate_multiplier=1.0)
    longer = {"spec": request_.runs[0].spec.model_copy(update={"hyperparameters": hyperparameters})}
    tell(child, several(request_, {}, longer, longer))
    assert child.stdin is not None
    assert child.stdout is not None
    said: dict[int, list[Report]] = {0: [], 1: [], 2: []}
    for line in child.stdout:
        report = parse_report(line)
        said[report.run].append(report)
        if report.run == 1 and isinstance(report, Step) and report.step == 3:
            child.stdin.write(Stop(stop=1).model_dump_json() + "\n")
            child.stdin.flush()
        if isinstance(report, Done):
            assert isinstance(said[1][-1], Stopped)
            child.terminate()

    assert child.wait(timeout=20) == 0
    assert isinstance(said[0][-1], Done)
    assert loads((request_.work_dir / "0" / said[0][-1].file).read_bytes()).manifest.base_model == BASE_MODEL
    for number, most in ((1, 7), (2, 399)):
        state, stopped = said[number][-2:]
        assert isinstance(state, State)
        assert isinstance(stopped, Stopped)
        assert 3 <= state.step <= most
        assert (request_.work_dir / str(number) / state.file).exists()


def test_runs_that_cannot_be_trained_together_follow_one_another(child: Child, request_: ChildRequest) -> None:
    other = request_.runs[0].spec.model_copy(update={"adapter": UoraSpec(r=2)})
    tell(child, several(request_, {}, {"spec": other}, {"training_file": request_.work_dir}))
    said = reports(child)

    assert child.wait(timeout=20) == 0
    failed, *rest = said
    assert isinstance(failed, Failed)
    assert failed.run == 2
    assert [report.run for report in rest] == sorted(report.run for report in rest)
    assert [report.run for report in rest if isinstance(report, Done)] == [0, 1]


def test_sigterm_before_the_first_step_ends_it_at_once(child: Child, request_: ChildRequest) -> None:
    with _stuck(child, request_):
        child.terminate()

        assert child.wait(timeout=5) == 143


def test_prints_of_libraries_do_not_reach_the_reports(tmp_path: Path) -> None:
    script = "import os; from worker import child; s = child._take_stdout(); print('noise', flush=True)\n"
    script += "os.system('echo more noise'); s.write('report\\n'); s.flush()\n"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, env=os.environ | child_environment()
    )

    assert result.stdout == "report\n"
    assert result.stderr == "noise\nmore noise\n"


@contextmanager
def _stuck(child: Child, request: ChildRequest) -> Iterator[None]:
    """The child is in the middle of reading a file that does not end."""
    fifo = request.work_dir.with_name("fifo")
    os.mkfifo(fifo)
    tell(child, of(request, {"training_file": fifo}))
    with fifo.open("wb"):  # opens when the child does
        yield
