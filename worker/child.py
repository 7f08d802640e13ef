"""One training run in a process of its own: ``python -m worker.child``, started by ``worker.supervisor``.

A crash, an out-of-memory kill or a cancel ends this process and not the worker, and CUDA is touched only here.
The request comes as the first line on stdin, which may be long after the start: what takes seconds to import is
imported meanwhile. That stdin stays open means that the parent is alive. Reports leave on a private copy of stdout; the
real one leads to stderr, so that no library's print can get between them.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

from uora.artifact import loads
from worker import failures
from worker.messages import ChildRequest, Done, Evaluated, Failed, Report, Started, State, Step, Stopped

if TYPE_CHECKING:  # torch takes seconds to load and is not needed to read a request
    from uora.data import Dataset, Row
    from uora.training import Evaluation, StepMetrics, TrainingResult

logger = logging.getLogger(__name__)


class ReportingObserver:
    """``uora.training.TrainingObserver`` that writes a line per report, artifacts and states into the work folder."""

    def __init__(self, request: ChildRequest, stream: TextIO) -> None:
        self._request = request
        self._stream = stream
        self._total_steps: int | None = None
        self._states = 0
        self._stopped = False

    def on_start(self, total_steps: int) -> None:
        """Report the beginning."""
        self._total_steps = total_steps
        self._send(Started(total_steps=total_steps))

    def on_step(self, metrics: StepMetrics) -> None:
        """Report a step."""
        self._send(Step(**asdict(metrics)))

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Store the adapter as it is now and report it."""
        file = self._store(f"step-{evaluation.step}.safetensors", evaluation.artifact)
        self._send(Evaluated(step=evaluation.step, metrics=dict(evaluation.metrics), file=file))

    def on_state(self, step: int, state: bytes) -> None:
        """Store what the run can go on from, and report it once it is whole.

        Each in a file of its own, which the parent removes: a stop may give the state of one step twice.
        """
        self._states += 1
        self._send(State(step=step, file=self._store(f"{self._states}.state", state)))

    def on_stopped(self) -> None:
        """Report that the run stopped as it was asked to."""
        self._send(Stopped())

    def on_done(self, result: TrainingResult) -> None:
        """Store the final adapter and report it."""
        self._send(
            Done(
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
        self._send(Failed(failure=failures.describe(error, param=param)))

    def should_stop(self) -> bool:
        """Whether SIGTERM has arrived."""
        return self._stopped

    def stop(self, _signal: int, _frame: object) -> None:
        """Handle SIGTERM: let the step end and its state be written; unwind at once where no step was begun."""
        self._stopped = True
        if self._total_steps is None:
            raise SystemExit(128 + signal.SIGTERM)

    def _store(self, file: str, content: bytes) -> str:
        (self._request.work_dir / file).write_bytes(content)
        return file

    def _send(self, report: Report) -> None:
        self._stream.write(report.model_dump_json() + "\n")
        self._stream.flush()


def main() -> int:
    """Read the request, train, report. Returns the exit status: 0 when a result, a stop or an error was reported."""
    stream = _take_stdout()
    # In a thread, so that a parent that leaves is noticed at once.
    imports = threading.Thread(target=_import, daemon=True)
    imports.start()
    line = sys.stdin.buffer.readline()
    if not line:
        return 1
    request = ChildRequest.model_validate_json(line)
    os.chdir(request.work_dir)
    watch = threading.Thread(target=_leave_with_parent, args=(request.work_dir,), daemon=True)
    watch.start()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    observer = ReportingObserver(request, stream)
    signal.signal(signal.SIGTERM, observer.stop)
    imports.join()
    _run(request, observer)
    return 0


def _import() -> None:
    """What takes seconds to import. Nothing here touches CUDA: a child that waits for its request has no part of it."""
    with suppress(Exception):  # what fails here fails again, and is reported, when it is used
        torch = import_module("torch")
        # peft imports bitsandbytes, which asks CUDA for its devices.
        asks_cuda = find_spec("bitsandbytes") is not None and torch.backends.cuda.is_built()
        import_module("uora.data")
        import_module("transformers.modeling_utils" if asks_cuda else "uora.training")


def _run(request: ChildRequest, observer: ReportingObserver) -> None:
    reading: str | None = None
    try:
        from uora.data import read_file
        from uora.training import TrainingStopped

        reading = "training_file"
        training = read_file(request.training_file, request.spec.task)
        reading = "validation_file"
        validation = read_file(request.validation_file, request.spec.task) if request.validation_file else None
        reading = None
        try:
            result = _train(request, observer, training=training, validation=validation)
        except TrainingStopped:
            observer.on_stopped()
        else:
            observer.on_done(result)
    except Exception as error:
        logger.exception("training failed")
        observer.on_error(error, param=reading)


def _train(
    request: ChildRequest,
    observer: ReportingObserver,
    *,
    training: Dataset[Row],
    validation: Dataset[Row] | None,
) -> TrainingResult:
    import torch

    from uora.models import fetch, pick_dtype
    from uora.training import train

    if request.torch_threads:
        torch.set_num_threads(request.torch_threads)
    return train(
        request.spec,
        base=fetch(request.base_model, request.base_source, cache_dir=request.cache_dir),
        training=training,
        validation=validation,
        observer=observer,
        cache_dir=request.cache_dir,
        dtype=pick_dtype(request.dtype),
        resume=request.resume.read_bytes() if request.resume else None,
        warm_start=loads(request.warm_start.read_bytes()) if request.warm_start else None,
    )


def _take_stdout() -> TextIO:
    private = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(private, "w", encoding="utf-8")


def _leave_with_parent(work_dir: Path) -> None:
    # os.read, not sys.stdin: the interpreter cannot shut down while a thread is inside a buffered reader.
    while os.read(0, 4096):
        pass
    shutil.rmtree(work_dir, ignore_errors=True)  # nobody else will
    if os.getpgrp() == os.getpid():  # started as leader: take along whatever was started from here
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
