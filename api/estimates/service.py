"""What a job would take, by its files' reports and the costs that were measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from api.caller import Caller
from api.estimates.schemas import EstimatedFile, EstimateError, JobEstimate
from api.jobs import service as jobs
from api.jobs.models import Job
from api.jobs.schemas import JobCreate
from api.reports import service as reports
from api.reports.models import FileReport, ReportStatus
from api.reports.schemas import ReportRequest
from api.settings import Settings
from api.unit_of_work import UnitOfWork
from uora.data import DatasetReport
from uora.estimate import Footprint, Prices, Sizes, estimate, measured_costs
from uora.spec import HyperparameterRequest, Task, TrainingOptions, TrainingSpec, parse_adapter, resolve


@dataclass(frozen=True)
class Answers:
    """The reports that an estimate stands on."""

    training: FileReport
    validation: FileReport | None

    @property
    def all(self) -> dict[str, FileReport]:
        """By the parameter that names the file."""
        found = {"training_file": self.training}
        return found if self.validation is None else found | {"validation_file": self.validation}


def estimate_job(work: UnitOfWork, caller: Caller, *, body: JobCreate, settings: Settings) -> JobEstimate:
    """What a job of this request would take, or would fail of; ``in_progress`` while a worker reads its files.

    Raises: as `api.jobs.service.plan`.
    """
    job = jobs.plan(work.session, caller, body=body, settings=settings)
    answers = _ask(work, caller, job)
    told = [(param, found.status, found.error) for param, found in answers.all.items()]
    for _, status, error in told:
        if status == ReportStatus.FAILED and error is not None:
            return JobEstimate(status="failed", model=job.model, error=EstimateError(**error))
    if any(status == ReportStatus.QUEUED for _, status, _ in told):
        return JobEstimate(status="in_progress", model=job.model)
    return _answer(job, answers, prices=settings.prices)


def _ask(work: UnitOfWork, caller: Caller, job: Job) -> Answers:
    options = TrainingOptions.model_validate(job.options)
    of_rows = ReportRequest(
        base_model=job.base_model,
        task=cast(Task, job.task),  # checked with the request
        max_length=options.max_length,
        overlong=options.overlong,
    )
    with_adapter = of_rows.model_copy(update={"adapter": job.adapter})
    training = reports.ask(work, caller, file_id=job.training_file, request=with_adapter)
    if job.validation_file is None:
        return Answers(training, None)
    beside = of_rows.model_copy(update={"training_file": job.training_file})
    return Answers(training, reports.ask(work, caller, file_id=job.validation_file, request=beside))


def _answer(job: Job, answers: Answers, *, prices: Prices) -> JobEstimate:
    found = {param: _report(row) for param, row in answers.all.items()}
    files = {param.removesuffix("_file"): _shown(answers.all[param].file_id, report) for param, report in found.items()}
    for param, report in found.items():
        if report.problems:
            first = report.problems[0]
            where = "" if first.location is None else f"{first.location}: "
            error = EstimateError(code=first.code, message=f"{where}{first.message}", param=param)
            return JobEstimate(status="completed", model=job.model, trainable=False, error=error, **files)
    footprint = _footprint(answers.training)
    training = found["training_file"]
    spec = _spec(job, rows=training.rows_usable)
    taken = estimate(
        spec,
        footprint.sizes,
        training,
        tokens_at_once=footprint.tokens_at_once,
        costs=measured_costs(),
        prices=prices,
    )
    return JobEstimate(
        status="completed",
        model=job.model,
        trainable=True,
        hyperparameters=spec.hyperparameters.model_dump(mode="json"),
        learning_rate=spec.learning_rate,
        adapter=spec.adapter.model_dump(mode="json"),
        steps=spec.total_steps(training.rows_usable),
        trainable_parameters=footprint.trainable_parameters,
        adapter_bytes=footprint.adapter_bytes,
        **taken.model_dump(),
        **files,
    )


def _report(row: FileReport) -> DatasetReport:
    return DatasetReport.model_validate(row.report)


def _shown(file_id: str, report: DatasetReport) -> EstimatedFile:
    return EstimatedFile(
        file=file_id,
        rows=report.rows_usable,
        tokens=report.tokens,
        learned_tokens=report.learned_tokens,
        problem_count=report.problem_count,
    )


def _footprint(row: FileReport) -> Footprint:
    stored: dict[str, Any] = row.footprint or {}
    return Footprint(**{**stored, "sizes": Sizes(**stored["sizes"])})


def _spec(job: Job, *, rows: int) -> TrainingSpec:
    """As validation settles it."""
    return resolve(
        HyperparameterRequest.model_validate(job.hyperparameters),
        adapter=parse_adapter(job.adapter),
        learning_rate=job.learning_rate,
        seed=job.seed,
        n_examples=rows,
        task=cast(Task, job.task),
        options=TrainingOptions.model_validate(job.options),
    )
