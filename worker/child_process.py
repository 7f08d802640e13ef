"""The process of training runs, seen from the worker: started, told, listened to, stopped."""

from __future__ import annotations

import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import IO, cast

import psutil
from pydantic import ValidationError

from worker.messages import ChildRequest, Report, Stop, parse_report

logger = logging.getLogger(__name__)

#: What a child may see of the environment: where programs, temporary files, caches and devices are, and how to
#: reach the sources of base models. No setting of this service is among it.
_PASSED = frozenset(
    {"PATH", "HOME", "LANG", "TZ", "TMPDIR", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "VIRTUAL_ENV"}
    | {"LD_LIBRARY_PATH", "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"}
)
_PASSED_PREFIXES = (
    *("LC_", "XDG_", "HF_", "PIP_"),
    *("OMP_", "KMP_", "MKL_", "OPENBLAS_", "CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "TORCH", "PYTORCH_"),
)

#: -P: what lies in the work folder is data, not code.
COMMAND = (sys.executable, "-P", "-m", "worker.child")
_STDERR_LINES_KEPT = 40


class ChildProcess:
    """A running ``python -m worker.child``, its reports and the end of its stderr."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        #: The most memory that `sample_memory` saw.
        self.peak_bytes = 0
        self._stdin, self._stdout, self._stderr = (
            cast(IO[str], stream) for stream in (process.stdin, process.stdout, process.stderr)
        )
        self._reports: queue.SimpleQueue[Report | None] = queue.SimpleQueue()
        self._last_lines: deque[str] = deque(maxlen=_STDERR_LINES_KEPT)
        self._readers = (
            threading.Thread(target=self._read_reports, daemon=True),
            threading.Thread(target=self._last_lines.extend, args=(self._stderr,), daemon=True),
        )
        for reader in self._readers:
            reader.start()

    @classmethod
    def start(cls) -> ChildProcess:
        """A child that imports what a training needs, and waits for its request. Whoever starts it stops it."""
        process = subprocess.Popen(  # noqa: S603 - a constant of this module
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",  # until it has its request, which names its work folder
            env=child_environment(),
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C in the worker's terminal is the worker's to handle
        )
        return cls(process)

    @contextmanager
    def running(self, request: ChildRequest, *, grace: timedelta) -> Iterator[None]:
        """Let it work on ``request``; at the end of the block it is gone."""
        try:
            self.send(request)
            yield
        finally:
            self.stop(grace)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def send(self, message: ChildRequest | Stop) -> None:
        """Hand over the request, or stop one of its runs; stdin stays open for as long as this process lives."""
        with suppress(BrokenPipeError):  # it is gone already: its end is found where reports are read
            self._stdin.write(message.model_dump_json() + "\n")
            self._stdin.flush()

    def next_report(self, *, within_seconds: float) -> Report | None:
        """The next report, or None after the last. Raises ``queue.Empty`` if there is none yet."""
        return self._reports.get(timeout=within_seconds)

    def wait(self, grace: timedelta) -> int | None:
        """The exit status of a child that said its last; negative is a signal, None that it does not end."""
        try:
            return self._process.wait(timeout=grace.total_seconds())
        except subprocess.TimeoutExpired:
            return None

    def ask_to_stop(self) -> None:
        """Stop all of its runs, by SIGTERM to the child alone: what it started may be needed to end the step."""
        self._process.send_signal(signal.SIGTERM)

    def sample_memory(self) -> None:
        """Look at what the child and those it started hold now, for `peak_bytes`."""
        with suppress(psutil.Error):  # it has just ended
            child = psutil.Process(self.pid)
            held = sum(process.memory_info().rss for process in (child, *child.children()))
            self.peak_bytes = max(self.peak_bytes, held)

    def stop(self, grace: timedelta) -> None:
        """SIGTERM to the child and all it started, SIGKILL ``grace`` later; harmless when it has ended."""
        if self._stdin.closed:
            return  # stopped before, and its number may be another process's by now
        if self.is_alive:
            self._signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=grace.total_seconds())
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._close()

    def log_stderr(self, jobs: str, *, level: int) -> None:
        """Write the last lines of the child's stderr to this worker's log, as those of ``jobs``."""
        self._readers[1].join(timeout=1)
        for line in list(self._last_lines):
            logger.log(level, "%s, training process: %s", jobs, line.rstrip())

    def _close(self) -> None:
        with suppress(BrokenPipeError):
            self._stdin.close()
        for reader, stream in zip(self._readers, (self._stdout, self._stderr), strict=True):
            reader.join(timeout=1)
            # Somebody who left the child's group may still hold the pipe; closing under a reader would hang.
            if not reader.is_alive():
                stream.close()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def _read_reports(self) -> None:
        for line in self._stdout:
            try:
                self._reports.put(parse_report(line))
            except ValidationError:
                logger.exception("unreadable report of a training process: %.200r", line)
        self._reports.put(None)


def child_environment() -> dict[str, str]:
    """The environment of a training child: a list of what is passed, so that a new secret is never among it."""
    passed = {name: value for name, value in os.environ.items() if name in _PASSED or name.startswith(_PASSED_PREFIXES)}
    # The child starts elsewhere; it finds this code where this process has it from.
    return passed | {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "PYTHONUNBUFFERED": "1"}
