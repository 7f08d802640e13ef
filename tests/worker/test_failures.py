"""What users are told about errors."""

from __future__ import annotations

import errno

import pytest

from uora.errors import BaseModelError, DataError, DigestError, SpecError, UoraError
from worker.failures import FailureKind, describe

SECRET = "host=10.0.0.7 password=hunter2"


class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (DataError("bad", line=3), "user", "invalid_training_file"),
        (DataError("bad", code="no_assistant_message"), "user", "no_assistant_message"),
        (SpecError("targets name nothing"), "user", "invalid_hyperparameters"),
        (UoraError("diverged", code="training_diverged"), "user", "training_diverged"),
        (UoraError("lower batch_size", code="out_of_memory"), "user", "out_of_memory"),
        (BaseModelError(SECRET), "platform", "base_model_unavailable"),
        (DigestError(SECRET), "platform", "internal_error"),
        (OSError(errno.ENOSPC, SECRET), "platform", "disk_full"),
        (OSError(errno.EACCES, SECRET), "platform", "internal_error"),
        (MemoryError(SECRET), "platform", "out_of_memory"),
        (OutOfMemoryError(SECRET), "platform", "out_of_memory"),
        (RuntimeError(f"DefaultCPUAllocator: not enough memory: {SECRET}"), "platform", "out_of_memory"),
        (RuntimeError(SECRET), "platform", "internal_error"),
        (KeyError(SECRET), "platform", "internal_error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_kind_and_code(error: Exception, kind: str, code: str) -> None:
    failure = describe(error)

    assert (failure.kind, failure.code) == (FailureKind(kind), code)
    assert "hunter2" not in failure.message


def test_messages_for_users_are_passed_on() -> None:
    failure = describe(DataError("the content is empty.", line=7), param="validation_file")

    assert failure.message == "Line 7: the content is empty."
    assert (failure.code, failure.param) == ("invalid_validation_file", "validation_file")


def test_the_errors_own_parameter_wins_over_the_place() -> None:
    assert describe(SpecError("no such module", param="targets"), param="model").param == "targets"
