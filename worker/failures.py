"""Why a job failed, as the user is told: one table from exceptions to codes and texts.

Text of an exception that nobody wrote for a user may hold paths, addresses or data of others, so it goes to
the log and never to the job.
"""

from __future__ import annotations

import errno
from enum import StrEnum

from pydantic import BaseModel, ConfigDict

from uora.errors import ArtifactError, BaseModelError, DataError, OutOfMemory, UoraError


class FailureKind(StrEnum):
    """Whose turn it is: the user's, with another file or setting, or that of whoever runs the service."""

    USER = "user"
    PLATFORM = "platform"


class Failure(BaseModel):
    """A failure as it is stored in ``job.error`` (the kind goes to the job's event)."""

    model_config = ConfigDict(frozen=True)

    kind: FailureKind
    code: str
    message: str
    param: str | None = None


#: What to do about a job that needs too much memory.
LESS_MEMORY = (
    "Use a smaller batch_size (training.gradient_accumulation_steps makes up for it), a smaller training.max_length "
    "or training.gradient_checkpointing; or give the trainer more memory and resume the job."
)
INTERNAL = Failure(
    kind=FailureKind.PLATFORM,
    code="internal_error",
    message="The job was stopped by an error inside the service, which its log describes. Nothing is wrong with "
    "your request; create the job again, and tell whoever runs the service if it happens twice.",
)
OUT_OF_MEMORY = Failure(
    kind=FailureKind.PLATFORM,
    code="out_of_memory",
    message=f"Training needed more memory than the trainer has. {LESS_MEMORY}",
)
DISK_FULL = Failure(
    kind=FailureKind.PLATFORM,
    code="disk_full",
    message="The trainer's disk is full. Whoever runs the service has to free some of it; then create the job again.",
)
TRAINER_LOST = Failure(
    kind=FailureKind.PLATFORM,
    code="trainer_lost",
    message="Several trainers in a row vanished without getting further with this job, and no more attempts are "
    f"made. If the job needs more memory than the trainers have: {LESS_MEMORY}",
)
BASE_MODEL_UNAVAILABLE = Failure(
    kind=FailureKind.PLATFORM,
    code="base_model_unavailable",
    message="The base model of this job could not be loaded; the service's log says why. Create the job again "
    "when that is mended.",
    param="model",
)


def killed(*, peak_bytes: int, total_bytes: int) -> Failure:
    """A training process that ended by a SIGKILL that nobody here sent.

    Args:
        peak_bytes: the most memory that it was seen with.
        total_bytes: memory that processes of its machine may have.
    """
    return Failure(
        kind=FailureKind.PLATFORM,
        code="out_of_memory_or_killed",
        message="The training process was killed by the system, most likely because memory ran out: it was seen with "
        f"{peak_bytes / 2**30:.1f} GiB of the {total_bytes / 2**30:.1f} GiB that there are. {LESS_MEMORY}",
    )


def describe(error: BaseException, *, param: str | None = None) -> Failure:
    """What to tell the user about ``error``.

    Args:
        error: what was raised.
        param: the request's field that it concerns, where the error does not know.
    """
    match error:
        case BaseModelError():
            return BASE_MODEL_UNAVAILABLE
        case DataError():
            # A data set does not know which of the two files it was read from, nor what the request calls it.
            return Failure(kind=FailureKind.USER, code=_data_code(error, param), message=error.message, param=param)
        case ArtifactError():  # made by us and fit for nothing: not what the user asked for
            return INTERNAL
        case UoraError():
            return Failure(kind=FailureKind.USER, code=error.code, message=error.message, param=error.param or param)
        case OSError(errno=errno.ENOSPC):
            return DISK_FULL
    return OUT_OF_MEMORY if _is_out_of_memory(error) else INTERNAL


def may_be_anothers(failure: Failure) -> bool:
    """Whether another run of the same process may have caused it, by its need of memory or by a crash."""
    return failure.kind is FailureKind.PLATFORM or failure.code == OutOfMemory.code


def _data_code(error: DataError, param: str | None) -> str:
    return "invalid_validation_file" if (error.code, param) == (DataError.code, "validation_file") else error.code


def _is_out_of_memory(error: BaseException) -> bool:
    # By name: this module is read where torch is not. On CPU torch raises a bare RuntimeError.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "not enough memory" in str(error))
    )
