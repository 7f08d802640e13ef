"""The processes that share one run (``uora.training.processes``).

The child that has the request is the first of them and starts the others: each is a ``worker.child`` with the same
request, a rank and a folder of its own. The first alone talks to the parent. The others live as long as it does, and
what ends one of them ends all: its error is the run's, and its death is the first one's, which the parent sees.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import IO, NoReturn, cast

from pydantic import ValidationError

from worker.child_process import COMMAND
from worker.messages import ChildRequest, Failed, parse_report


def start_others(request: ChildRequest, *, failed: Callable[[Failed], object]) -> None:
    """Start the processes beside the first one of ``request``.

    Args:
        request: of the first.
        failed: told, in a thread of its own, of an error that one of the others had.
    """
    for rank in range(1, request.processes):
        process = subprocess.Popen(  # noqa: S603 - a constant of this project
            COMMAND,
            stdin=subprocess.PIPE,  # open until this process ends, and then the other leaves
            stdout=subprocess.PIPE,
            cwd="/",
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        threading.Thread(target=_accompany, args=(process, _request_of(rank, request), failed), daemon=True).start()


def _request_of(rank: int, request: ChildRequest) -> ChildRequest:
    folder = request.work_dir / f"rank-{rank}"
    folder.mkdir()
    runs = tuple(run.model_copy(update={"work_dir": folder}) for run in request.runs)
    return request.model_copy(update={"rank": rank, "runs": runs})


def _accompany(process: subprocess.Popen[str], request: ChildRequest, failed: Callable[[Failed], object]) -> NoReturn:
    stdin, stdout = (cast(IO[str], stream) for stream in (process.stdin, process.stdout))
    with suppress(BrokenPipeError):  # it is gone already, as its stdout tells
        stdin.write(request.model_dump_json() + "\n")
        stdin.flush()
    for line in stdout:
        with suppress(ValidationError):  # whatever else it is, it is no error
            report = parse_report(line)
            if isinstance(report, Failed):
                failed(report)
    _end_as(process.wait())


def _end_as(status: int) -> NoReturn:
    """End this process as one ended that should have lived as long."""
    if status == -signal.SIGKILL:  # most likely for want of memory, which the parent tells the user
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(128 - status if status < 0 else status or 1)
