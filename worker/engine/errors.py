"""What the engine answers in place of a result."""

from __future__ import annotations


class EngineError(Exception):
    """A refusal, as HTTP has it."""

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.retry_after = retry_after
