"""Runs in Weights & Biases that follow a job's measurements.

Each has a thread of its own: the library may wait for a network that is not there, and no training waits with it.
Whatever goes wrong there is told in the job's log, and changes nothing else.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

from structlog.contextvars import bound_contextvars

from api.jobs.integrations import Integration, WandbTarget
from api.jobs.models import Job
from api.jobs.repository import add_event
from api.settings import Settings
from worker.lease import Lease, LeaseLost, Sessions, writing

logger = logging.getLogger(__name__)

#: How long a run that has ended may take to send what it still has.
FINISH_SECONDS = 60.0
_TAG_LETTERS = 64
_NO_MEASUREMENTS = frozenset({"type", "run", "step", "total_steps", "seconds_left"})


class Followers:
    """All that follow one job; without any, nothing happens."""

    def __init__(self, runs: list[WandbRun] | None = None) -> None:
        self._runs = runs or []

    @classmethod
    def of(cls, job: Job, lease: Lease, sessions: Sessions, settings: Settings) -> Followers:
        """Start what the job asks for."""
        wanted = [Integration.model_validate(each) for each in job.integrations or ()]

        def tell(problem: str) -> None:
            _warn(sessions, lease, problem)

        return cls([WandbRun(_arguments(job, each.wandb, place), settings, tell) for place, each in enumerate(wanted)])

    def log(self, step: int, measured: Mapping[str, Any]) -> None:
        """Pass on the numbers of a step."""
        numbers = {name: value for name, value in measured.items() if name not in _NO_MEASUREMENTS}
        for run in self._runs:
            run.put(step, {name: value for name, value in numbers.items() if value is not None})

    def close(self, *, failed: bool) -> None:
        """End the runs; what they still have is sent behind the caller's back. Twice is as good as once."""
        for run in self._runs:
            run.close(exit_code=int(failed))


class WandbRun:
    """One run and its thread.

    Args:
        arguments: of ``wandb.init``.
        settings: the operator's key, mode and server.
        tell: told of a problem, once.
    """

    def __init__(self, arguments: dict[str, Any], settings: Settings, tell: Callable[[str], None]) -> None:
        self._arguments = arguments
        self._settings = settings
        self._tell = tell
        self._waiting: queue.SimpleQueue[tuple[int, dict[str, Any]] | int] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._follow, name=f"wandb-{arguments['id']}", daemon=True)
        self._thread.start()

    def put(self, step: int, numbers: dict[str, Any]) -> None:
        """Log them, later."""
        self._waiting.put((step, numbers))

    def close(self, *, exit_code: int) -> None:
        """End the run after what was put before."""
        self._waiting.put(exit_code)

    def _follow(self) -> None:
        with bound_contextvars(job_id=self._arguments["id"]):
            self._follow_to_the_end()

    def _follow_to_the_end(self) -> None:
        try:
            self._log_all()
        except Exception as error:
            logger.warning("%s: Weights & Biases gave up", self._arguments["id"], exc_info=True)
            key = self._settings.wandb_api_key
            text = f"{type(error).__name__}: {error}"[:500]
            self._tell(text.replace(key.get_secret_value(), "***") if key else text)

    def _log_all(self) -> None:
        import wandb  # seconds, and only where it is wanted

        settings = self._settings
        folder = settings.home / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        key = settings.wandb_api_key
        run = wandb.init(
            **self._arguments,
            dir=str(folder),
            mode=settings.wandb_mode,
            # Jobs of one process have runs of their own; a job that goes on, the run that it had.
            reinit="create_new",
            resume="allow" if settings.wandb_mode == "online" else None,
            settings=wandb.Settings(
                api_key=key.get_secret_value() if key else None,
                base_url=settings.wandb_base_url,
                silent=True,
                console="off",
                save_code=False,
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,
                x_disable_stats=True,
                finish_timeout=FINISH_SECONDS,
            ),
        )
        while not isinstance(item := self._waiting.get(), int):
            step, numbers = item
            run.log(numbers, step=step)
        run.finish(exit_code=item)


def _arguments(job: Job, target: WandbTarget, place: int) -> dict[str, Any]:
    tags = ["uora/finetune", f"uora/{job.base_model}", f"uora/{job.id}", *(target.tags or ())]
    return {
        "project": target.project,
        "entity": target.entity,
        "name": target.name or job.id,
        "tags": list(dict.fromkeys(tag[:_TAG_LETTERS] for tag in tags)),
        "id": job.id if place == 0 else f"{job.id}-{place + 1}",
        "config": {
            "model": job.model,
            "task": job.task,
            "seed": job.seed,
            "training_file": job.training_file,
            "validation_file": job.validation_file,
            **(job.training_spec or {}),
        },
    }


def _warn(sessions: Sessions, lease: Lease, problem: str) -> None:
    try:
        with writing(sessions, lease) as (session, job):
            add_event(session, job.id, message=f"Weights & Biases: {problem}", level="warn")
    except LeaseLost:
        pass  # the job has ended: the worker's log has it
    except Exception:
        logger.warning("job %s: a problem with Weights & Biases cannot be told", lease.job_id, exc_info=True)
