"""``training.run``: claim a queued job, train it in a child process, record how it ended."""

from __future__ import annotations

import logging
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import assert_never

from sqlalchemy.exc import OperationalError

from api.files.repository import FileRepository
from uora.spec import TrainingSpec
from worker import failures, results
from worker.context import Resources, resources
from worker.failures import Failure
from worker.lease import Lease, LeaseLost, claim, writing
from worker.messages import ChildRequest
from worker.results import Finished
from worker.starting import load_state, load_warm_start
from worker.supervisor import CancelRequested, Interrupted, Outcome, TakenOver, patiently, supervise

logger = logging.getLogger(__name__)


def run(job_id: str) -> None:
    """Train the job, unless somebody else has it or it is over. What the message is worth decides the claim."""
    train(resources(), job_id)


def train(held: Resources, job_id: str) -> None:
    """`run` on given resources."""
    settings = held.settings
    if held.stopping.is_set():
        return
    lease = claim(held.sessions, job_id, owner=held.owner, ttl=settings.lease_ttl, max_attempts=settings.max_attempts)
    if lease is None:
        return
    try:
        _settle(held, lease, _outcome(held, lease))
    except LeaseLost as lost:
        logger.warning("%s", lost)
    finally:
        if settings.spare_trainer:
            held.spare.refill()


def record(held: Resources, lease: Lease, outcome: Outcome) -> None:
    """Write down how an attempt ended.

    Raises:
        LeaseLost: the job is no longer this worker's.
    """
    match outcome:
        case Finished():
            results.succeed(held.sessions, lease, outcome, storage=held.storage)
        case Failure():
            results.fail(held.sessions, lease, outcome)
        case CancelRequested():
            results.cancel(held.sessions, lease)
        case Interrupted():
            results.interrupt(held.sessions, lease)
        case TakenOver():
            pass
        case _:
            assert_never(outcome)
    logger.info("job %s, attempt %d: %s", lease.job_id, lease.attempt, type(outcome).__name__)


def _outcome(held: Resources, lease: Lease) -> Outcome:
    try:
        with ExitStack() as stack:
            work_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="uora-training-")))
            return supervise(held, lease, _request(held, lease, work_dir, stack))
    except (LeaseLost, OperationalError):
        raise
    except Exception as error:
        logger.exception("job %s: the trainer failed", lease.job_id)
        return failures.describe(error)


def _settle(held: Resources, lease: Lease, outcome: Outcome) -> None:
    patience = held.settings.lease_ttl
    try:
        patiently(partial(record, held, lease, outcome), patience=patience)
    except (LeaseLost, OperationalError):
        raise
    except Exception as error:  # a result that cannot be stored will not be storable after another training
        logger.exception("job %s: its result cannot be stored", lease.job_id)
        patiently(partial(record, held, lease, failures.describe(error)), patience=patience)


def _request(held: Resources, lease: Lease, work_dir: Path, stack: ExitStack) -> ChildRequest:
    """What the child needs; stored files stay readable until ``stack`` is left."""
    settings = held.settings
    with writing(held.sessions, lease) as (session, job):
        files = FileRepository(session, lease.project_id)
        training = files.get(job.training_file)
        validation = files.get(job.validation_file) if job.validation_file else None
        state = load_state(session, job.id)
        # A state has all that its run began with, so a model that was deleted since then is not missed.
        warm_start = None if state else load_warm_start(session, job)
    return ChildRequest(
        spec=TrainingSpec.model_validate(job.training_spec),
        base_model=job.base_model,
        base_source=settings.base_models[job.base_model],
        training_file=stack.enter_context(held.storage.local_path(training.storage_key)),
        validation_file=validation and stack.enter_context(held.storage.local_path(validation.storage_key)),
        resume=_write(work_dir / "resume.state", state),
        warm_start=_write(work_dir / "warm_start.safetensors", warm_start),
        work_dir=work_dir,
        cache_dir=settings.cache_dir,
        dtype=settings.dtype,
        torch_threads=settings.torch_threads,
    )


def _write(path: Path, content: bytes | None) -> Path | None:
    if content is None:
        return None
    path.write_bytes(content)
    return path
