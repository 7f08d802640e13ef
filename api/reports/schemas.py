"""Reports on files: what is asked, and the answer on the wire."""

from __future__ import annotations

import hashlib
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from api.reports.models import FileReport, ReportStatus
from uora.data.fitting import Overlong
from uora.spec import Task

#: What a report has to say only for a model.
NEEDS_MODEL = frozenset(
    {"tokens", "learned_tokens", "lengths", "rows_truncated", "rows_dropped", "previews", "estimate", "leak"}
)


class ReportRequest(BaseModel):
    """What is asked about a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Whose tokens are counted; None for what can be said without a model.
    base_model: str | None = None
    #: None to tell it by the first row.
    task: Task | None = None
    max_length: int | None = None
    overlong: Overlong = "error"
    #: The training file beside which this one validates.
    training_file: str | None = None
    #: ``uora.spec.AdapterSpec`` whose sizes are wanted too.
    adapter: dict[str, Any] | None = None

    @property
    def key(self) -> str:
        """Equal for equal requests."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @property
    def rows(self) -> ReportRequest:
        """What is asked about the rows alone."""
        return self.model_copy(update={"adapter": None})


class ReportError(BaseModel):
    """Why there is no report."""

    code: str
    message: str
    param: str | None = None


class FileReportObject(BaseModel):
    """What a file is, what is in it and what is wrong with it: ``report`` is ``uora.data.DatasetReport``."""

    object: Literal["file.report"] = "file.report"
    file: str
    #: The base model whose tokens were counted.
    model: str | None
    status: str
    report: dict[str, Any] | None
    error: ReportError | None

    @classmethod
    def of(cls, found: FileReport) -> Self:
        """Show a row."""
        model = found.request["base_model"]
        report = found.report
        if report is not None and model is None:
            report = {name: value for name, value in report.items() if name not in NEEDS_MODEL}
        return cls(
            file=found.file_id,
            model=model,
            status="in_progress" if found.status == ReportStatus.QUEUED else found.status,
            report=report,
            error=None if found.error is None else ReportError(**found.error),
        )
