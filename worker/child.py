"""Training runs on one base model in a process: ``python -m worker.child``, started by ``worker.supervisor``.

A crash, an out-of-memory kill or a cancel ends this process and not the worker, and CUDA is touched only here and in
the processes that share its run (``worker.ranks``).
The request comes as the first line on stdin, which may be long after the start: what takes seconds to import is
imported meanwhile. Later lines stop single runs; that stdin stays open means that the parent is alive. Reports leave on
a private copy of stdout; the real one leads to stderr, so that no library's print can get between them.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from uora.artifact import loads
from worker import failures
from worker.collector import spared
from worker.messages import ChildRequest, Done, Evaluated, Failed, Report, Run, Started, State, Step, Stop, Stopped
from worker.ranks import start_others

if TYPE_CHECKING:  # torch takes seconds to load and is not needed to read a request
    from uora.training import Evaluation, StepMetrics, TrainingResult
    from uora.training.cotraining import EndCallback, Member

logger = logging.getLogger(__name__)

#: In a run of several processes, an error may be the echo of another one's end, or be everybody's: how long the first
#: process waits for the one who knows better.
_ECHO_SECONDS = 1.0


class ReportingObserver:
    """``uora.training.TrainingObserver`` that writes a line per report, artifacts and states into the work folder."""

    def __init__(self, number: int, work_dir: Path, stream: TextIO, *, echo_seconds: float = 0) -> None:
        """For the run of this ``number`` in the request.

        Args:
            number: as reports name it.
            work_dir: for artifacts and states.
            stream: for reports.
            echo_seconds: how long an error waits to be reported that may be the echo of another process's end, which
                would end this process meanwhile.
        """
        self._number = number
        self._work_dir = work_dir
        self._stream = stream
        self._echo_seconds = echo_seconds
        self._lock = threading.RLock()
        self._total_steps: int | None = None
        self._states = 0
        self._stopped = False
        #: Whether nothing more is to be reported.
        self.has_ended = False

    @property
    def has_begun(self) -> bool:
        """Whether there is a state to keep when it is stopped."""
        return self._total_steps is not None

    def on_start(self, total_steps: int) -> None:
        """Report the beginning."""
        self._total_steps = total_steps
        self._send(Started(run=self._number, total_steps=total_steps))

    def on_step(self, metrics: StepMetrics) -> None:
        """Report a step."""
        self._send(Step(run=self._number, **asdict(metrics)))

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Store the adapter as it is now and report it."""
        file = self._store(f"step-{evaluation.step}.safetensors", evaluation.artifact)
        self._send(Evaluated(run=self._number, step=evaluation.step, metrics=dict(evaluation.metrics), file=file))

    def on_state(self, step: int, state: bytes) -> None:
        """Store what the run can go on from, and report it once it is whole.

        Each in a file of its own, which the parent removes: a stop may give the state of one step twice.
        """
        self._states += 1
        self._send(State(run=self._number, step=step, file=self._store(f"{self._states}.state", state)))

    def on_stopped(self) -> None:
        """Report that the run stopped as it was asked to."""
        self.end(Stopped(run=self._number))

    def on_done(self, result: TrainingResult) -> None:
        """Store the final adapter and report it."""
        self.end(
            Done(
                run=self._number,
                file=self._store("final.safetensors", result.artifact),
                trained_tokens=result.trained_tokens,
                steps=result.steps,
                hits=result.hits,
                metrics=dict(result.metrics),
                stopped_early=result.steps < (self._total_steps or 0),
            )
        )

    def on_error(self, error: Exception, *, param: str | None) -> None:
        """Report why there will be no adapter."""
        failure = failures.describe(error, param=param)
        if failure.kind is failures.FailureKind.PLATFORM:
            time.sleep(self._echo_seconds)
        self.end(Failed(run=self._number, failure=failure))

    def end(self, report: Report) -> None:
        """Report how the run ended, unless it has been: in several processes, the first to fail tells why."""
        with self._lock:
            if not self.has_ended:
                self._send(report)
                self.has_ended = True

    def should_stop(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped

    def stop(self) -> None:
        """Let the step end and its state be written."""
        self._stopped = True

    def _store(self, file: str, content: bytes) -> str:
        (self._work_dir / file).write_bytes(content)
        return file

    def _send(self, report: Report) -> None:
        with self._lock:
            self._stream.write(report.model_dump_json() + "\n")
            self._stream.flush()


def main() -> int:
    """Read the request, train, report. Returns the exit status: 0 when every run's end was reported."""
    stream = _take_stdout()
    # In a thread, so that a parent that leaves is noticed at once.
    imports = threading.Thread(target=_import, daemon=True)
    imports.start()
    lines = _lines()
    line = next(lines, None)
    if line is None:
        return 1
    request = ChildRequest.model_validate_json(line)
    os.chdir(request.work_dir)
    echo_seconds = _ECHO_SECONDS if request.processes > 1 else 0
    observers = [
        ReportingObserver(number, run.work_dir, stream, echo_seconds=echo_seconds)
        for number, run in enumerate(request.runs)
    ]
    obeying = threading.Thread(target=_obey, args=(lines, observers, request.work_dir), daemon=True)
    obeying.start()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    if request.rank == 0:
        signal.signal(signal.SIGTERM, lambda *_: _stop_all(observers))
        start_others(request, failed=lambda report: _end_with(report, observers))
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the first process is asked, and all of them stop
    imports.join()
    _run(request, observers)
    if request.rank > 0:
        obeying.join()  # the first one may still talk to it, so it leaves with it
    return 0


def _lines() -> Iterator[bytes]:
    """Lines on stdin, as they come."""
    # os.read, not sys.stdin: the interpreter cannot shut down while a thread is inside a buffered reader.
    rest = b""
    while chunk := os.read(0, 65536):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines


def _obey(lines: Iterable[bytes], observers: Sequence[ReportingObserver], work_dir: Path) -> None:
    for line in lines:
        observers[Stop.model_validate_json(line).stop].stop()
    _leave_with_parent(work_dir)


def _stop_all(observers: Iterable[ReportingObserver]) -> None:
    """Handle SIGTERM: let every run end its step; unwind at once where none has begun one."""
    for observer in observers:
        observer.stop()
    if not any(observer.has_begun for observer in observers):
        raise SystemExit(128 + signal.SIGTERM)


def _end_with(report: Failed, observers: Sequence[ReportingObserver]) -> NoReturn:
    """Another process of the run failed, and waits to be ended."""
    time.sleep(_ECHO_SECONDS)  # most errors are all processes', and this one reports its state before its own
    observers[report.run].end(report)
    os._exit(0)


def _import() -> None:
    """What takes seconds to import. Nothing here touches CUDA: a child that waits for its request has no part of it."""
    with spared(), suppress(Exception):  # what fails here fails again, and is reported, when it is used
        import_module("uora.data")
        import_module("uora.training.cotraining")


def _run(request: ChildRequest, observers: Sequence[ReportingObserver]) -> None:
    try:
        read = {number: _read(run, observers[number]) for number, run in enumerate(request.runs)}
        members = {number: member for number, member in read.items() if member is not None}
        if members:
            _train(request, members, ended=lambda number, outcome: _report(observers[number], outcome))
    except Exception as error:
        logger.exception("training failed")
        for observer in observers:
            if not observer.has_ended:
                observer.on_error(error, param=None)


def _read(run: Run, observer: ReportingObserver) -> Member | None:
    """What the run needs; None if it cannot be read, which is reported."""
    reading: str | None = None
    try:
        from uora.data import read_file
        from uora.training.cotraining import Member

        reading = "training_file"
        training = read_file(run.training_file, run.spec.task)
        reading = "validation_file"
        validation = read_file(run.validation_file, run.spec.task) if run.validation_file else None
        reading = None
        return Member(
            run.spec,
            training,
            validation,
            observer,
            resume=run.resume.read_bytes() if run.resume else None,
            warm_start=loads(run.warm_start.read_bytes()) if run.warm_start else None,
        )
    except Exception as error:
        logger.exception("training failed")
        observer.on_error(error, param=reading)
        return None


def _train(request: ChildRequest, members: Mapping[int, Member], *, ended: EndCallback) -> None:
    """Train the runs together if they are several that can be, else one after the other."""
    import torch

    from uora.models import fetch, pick_dtype

    if request.torch_threads:
        torch.set_num_threads(request.torch_threads)
    if request.processes > 1:
        _join(request)
    common = {
        "base": fetch(request.base_model, request.base_source, cache_dir=request.cache_dir),
        "cache_dir": request.cache_dir,
        "dtype": pick_dtype(request.dtype),
    }
    if len(members) > 1 and _train_together(members, common, ended=ended):
        return
    for number, member in members.items():
        ended(number, _train_alone(member, common))


def _join(request: ChildRequest) -> None:
    import torch

    from uora.training import processes

    if not request.torch_threads:
        torch.set_num_threads(max(1, torch.get_num_threads() // request.processes))
    processes.join(request.work_dir / "meeting", rank=request.rank, of=request.processes)


def _train_together(members: Mapping[int, Member], common: dict[str, Any], *, ended: EndCallback) -> bool:
    """Whether they could be; if not, nothing was trained."""
    from uora.errors import SpecError
    from uora.training.cotraining import cotrain

    numbers = list(members)
    try:
        cotrain(list(members.values()), **common, ended=lambda place, outcome: ended(numbers[place], outcome))
    except SpecError as error:
        if error.code != "cannot_cotrain":
            raise
        logger.warning("the runs are trained one after the other: %s", error)
        return False
    return True


def _train_alone(member: Member, common: dict[str, Any]) -> TrainingResult | Exception:
    from uora.training import TrainingStopped, train

    if member.observer.should_stop():  # while another was trained
        return TrainingStopped()
    try:
        return train(
            member.spec,
            training=member.training,
            validation=member.validation,
            observer=member.observer,
            resume=member.resume,
            warm_start=member.warm_start,
            **common,
        )
    except Exception as error:
        return error


def _report(observer: ReportingObserver, outcome: TrainingResult | Exception) -> None:
    from uora.training import TrainingStopped

    try:
        if isinstance(outcome, TrainingStopped):
            observer.on_stopped()
        elif isinstance(outcome, Exception):
            raise outcome
        else:
            observer.on_done(outcome)
    except Exception as error:
        logger.exception("training failed")
        observer.on_error(error, param=None)


def _take_stdout() -> TextIO:
    private = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(private, "w", encoding="utf-8")


def _leave_with_parent(work_dir: Path) -> NoReturn:
    if os.getpgrp() == os.getpid():  # the parent was the worker: take along what it left, and whatever was started here
        # Under another name first: what a run still writes would come between the files' end and the folder's.
        with suppress(OSError):
            shutil.rmtree(work_dir.rename(work_dir.with_name(f"{work_dir.name}.left")), ignore_errors=True)
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def run_and_exit() -> NoReturn:
    """The process from its first line to its last."""
    try:
        status = main()
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    # Everything is written and removed by now; taking torch down in good order would last seconds more.
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    run_and_exit()
