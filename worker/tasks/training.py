"""``training.run``: claim a queued job and those that go with it, train them in a child process, record their ends."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

from sqlalchemy.exc import OperationalError
from structlog.contextvars import bound_contextvars

from api.files.repository import FileRepository
from api.queue import TaskName
from api.quotas import repository as quotas
from uora.spec import TrainingSpec
from worker import failures, metrics, results
from worker.context import Resources, resources
from worker.delivering import ring
from worker.failures import Failure
from worker.lease import Lease, LeaseLost, claim, claim_companions, writing
from worker.messages import ChildRequest, Run
from worker.progress import Trained
from worker.results import NOTHING, Finished
from worker.starting import load_state, load_warm_start
from worker.supervisor import CancelRequested, Interrupted, Outcome, Settle, TakenOver, patiently, supervise

logger = logging.getLogger(__name__)


#: What metrics and traces call an end.
OUTCOMES: dict[type[Outcome], str] = {
    Finished: "succeeded",
    Failure: "failed",
    CancelRequested: "cancelled",
    Interrupted: "interrupted",
    TakenOver: "lease_lost",
}


def run(job_id: str) -> None:
    """Train the job, unless somebody else has it or it is over. What the message is worth decides the claim."""
    train(resources(), job_id)


def train(held: Resources, job_id: str) -> None:
    """`run` on given resources."""
    settings = held.settings
    if held.stopping.is_set():
        return
    lease = claim(
        held.sessions,
        job_id,
        owner=held.owner,
        ttl=settings.lease_ttl,
        max_attempts=settings.max_attempts,
        max_running=settings.quota_jobs_running,
    )
    if lease is None:
        return
    try:
        at_most = settings.cotrain_jobs - 1 if settings.training_processes == 1 else 0
        others = claim_companions(
            held.sessions, lease, at_most=at_most, ttl=settings.lease_ttl, max_running=settings.quota_jobs_running
        )
        _train(held, [lease, *others])
    finally:
        if settings.spare_trainer:
            held.spare.refill()


def record(held: Resources, lease: Lease, outcome: Outcome, trained: Trained = NOTHING) -> None:
    """Write down how an attempt ended, and what its run has come to.

    Raises:
        LeaseLost: the job is no longer this worker's.
    """
    match outcome:
        case Finished():
            results.succeed(held.sessions, lease, outcome, storage=held.storage, trained=trained)
        case Failure():
            results.fail(held.sessions, lease, outcome, trained=trained)
        case CancelRequested():
            results.cancel(held.sessions, lease, trained=trained)
        case Interrupted():
            results.interrupt(held.sessions, lease, alone=outcome.alone, trained=trained)
        case TakenOver():
            pass
        case _:
            assert_never(outcome)
    logger.info("job %s, attempt %d: %s", lease.job_id, lease.attempt, type(outcome).__name__)


def _train(held: Resources, leases: Sequence[Lease]) -> None:
    """Train the jobs in one process, and settle each, unless the database is gone."""
    unsettled = list(leases)

    def settle(lease: Lease, outcome: Outcome, trained: Trained = NOTHING) -> None:
        unsettled.remove(lease)
        with bound_contextvars(job_id=lease.job_id):
            name = _settle(held, lease, outcome, trained)
        metrics.ATTEMPTS.labels(name).inc()
        lease.trace.end(name)

    try:
        with ExitStack() as stack:
            work_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="uora-training-")))
            ready = [each for lease in leases if (each := _prepare(held, lease, work_dir, stack, settle))]
            if ready:
                supervise(held, [each.lease for each in ready], _request(held, ready, work_dir), settle)
    except OperationalError:
        raise
    except Exception as error:
        jobs = ", ".join(lease.job_id for lease in unsettled)
        with bound_contextvars(job_id=jobs):
            logger.exception("%s: the trainer failed", jobs)
        for lease in tuple(unsettled):
            settle(lease, failures.describe(error))


def _settle(held: Resources, lease: Lease, outcome: Outcome, trained: Trained) -> str:
    """Write down how an attempt ended; which of `OUTCOMES` that came to."""

    def write() -> Outcome:
        try:
            record(held, lease, outcome, trained)
        except (LeaseLost, OperationalError):
            raise
        except Exception as error:  # a result that cannot be stored will not be storable after another training
            logger.exception("job %s: its result cannot be stored", lease.job_id)
            failure = failures.describe(error)
            record(held, lease, failure, trained)
            return failure
        return outcome

    try:
        with lease.trace.committing():
            settled = patiently(write, patience=held.settings.lease_ttl)
        ring(held, lease.job_id)
        _ring_next(held, lease.project_id)
    except LeaseLost as lost:
        logger.warning("%s", lost)
        return OUTCOMES[TakenOver]
    return OUTCOMES[type(settled)]


def _ring_next(held: Resources, project_id: str) -> None:
    """For a job that waited since its project had as many running as it may; else the sweeper would, a little later."""
    try:
        with held.sessions() as session:
            default = held.settings.quota_jobs_running
            waiting = quotas.jobs_to_ring(session, project_id, default_running=default, limit=1)
        for job_id in waiting:
            held.queue.send(TaskName.TRAIN, job_id)
    except Exception:  # the job's end is recorded, and must not seem otherwise
        logger.warning("project %s: its next job waits for the sweeper", project_id, exc_info=True)


@dataclass(frozen=True)
class _Ready:
    """A claimed job with all that its run needs."""

    lease: Lease
    base_model: str
    run: Run


def _prepare(held: Resources, lease: Lease, work_dir: Path, stack: ExitStack, settle: Settle) -> _Ready | None:
    """None if the job's run cannot have what it needs, which is settled."""
    with bound_contextvars(job_id=lease.job_id):
        try:
            return _ready(held, lease, work_dir / lease.job_id, stack)
        except OperationalError:
            raise
        except LeaseLost:
            settle(lease, TakenOver(), NOTHING)
        except Exception as error:
            logger.exception("job %s: its run cannot be prepared", lease.job_id)
            settle(lease, failures.describe(error), NOTHING)
        return None


def _ready(held: Resources, lease: Lease, work_dir: Path, stack: ExitStack) -> _Ready:
    """Stored files stay readable until ``stack`` is left."""
    with writing(held.sessions, lease) as (session, job):
        files = FileRepository(session, lease.project_id)
        training = files.get_kept(job.training_file)
        validation = files.get_kept(job.validation_file) if job.validation_file else None
        state = load_state(session, job.id)
        # A state has all that its run began with, so a model that was deleted since then is not missed.
        warm_start = None if state else load_warm_start(session, job)
    work_dir.mkdir()
    run = Run(
        spec=TrainingSpec.model_validate(job.training_spec),
        training_file=stack.enter_context(held.storage.local_path(training.storage_key)),
        validation_file=validation and stack.enter_context(held.storage.local_path(validation.storage_key)),
        resume=_write(work_dir / "resume.state", state),
        warm_start=_write(work_dir / "warm_start.safetensors", warm_start),
        work_dir=work_dir,
    )
    return _Ready(lease, job.base_model, run)


def _request(held: Resources, ready: Sequence[_Ready], work_dir: Path) -> ChildRequest:
    settings = held.settings
    base_model = ready[0].base_model  # the others' too: they have the same key
    return ChildRequest(
        runs=tuple(each.run for each in ready),
        base_model=base_model,
        base_source=settings.base_models[base_model],
        work_dir=work_dir,
        cache_dir=settings.cache_dir,
        dtype=settings.dtype,
        torch_threads=settings.torch_threads,
        processes=settings.training_processes,
    )


def _write(path: Path, content: bytes | None) -> Path | None:
    if content is None:
        return None
    path.write_bytes(content)
    return path
