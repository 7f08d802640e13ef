"""Fine-tuning jobs on the wire, and our extension key ``peft``."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    field_validator,
    model_validator,
)

from api.jobs.integrations import Integrations
from api.jobs.models import Checkpoint, Job, JobEvent, JobStatus
from api.pagination import Shown
from uora.spec import (
    AdapterSpec,
    HyperparameterRequest,
    LoraSpec,
    OloraSpec,
    OsoraSpec,
    Task,
    TrainingOptions,
    UoraSpec,
    VeraSpec,
    default_method,
    parse_adapter,
)

MAX_SEED = 2**31 - 1
MAX_SUFFIX = 64
Suffix = Annotated[str, Field(min_length=1, max_length=MAX_SUFFIX, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]
Metadata = Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)]


class _Request(BaseModel):
    """A misspelt key must not cost a training run, so unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class _Peft(BaseModel):
    """What every method's request has beside the method's own settings."""

    #: Absolute peak learning rate of multiplier 1; None for the method's default.
    learning_rate: float | None = Field(default=None, gt=0.0, le=100.0)

    @field_validator("targets", mode="before", check_fields=False)
    @classmethod
    def _split_targets(cls, value: Any) -> Any:
        """Take ``"q_proj,v_proj"`` as well as a list."""
        if isinstance(value, str) and value not in ("all-linear", "q,v"):
            return [name.strip() for name in value.split(",") if name.strip()]
        return value

    def adapter(self) -> AdapterSpec:
        """The adapter without the learning rate."""
        return parse_adapter(self.model_dump(exclude={"learning_rate"}))


class UoraRequest(UoraSpec, _Peft):
    """UORA, the default."""


class VeraRequest(VeraSpec, _Peft):
    """VeRA."""


class LoraRequest(LoraSpec, _Peft):
    """LoRA."""


class OloraRequest(OloraSpec, _Peft):
    """OLoRA."""


class OsoraRequest(OsoraSpec, _Peft):
    """OSoRA."""


#: The adapter to train, beyond what OpenAI's API can say.
PeftRequest = Annotated[
    UoraRequest | VeraRequest | LoraRequest | OloraRequest | OsoraRequest,
    Field(discriminator="method"),
    BeforeValidator(default_method),
]


class SupervisedRequest(_Request):
    """Settings of supervised fine-tuning."""

    hyperparameters: HyperparameterRequest = HyperparameterRequest()


class MethodRequest(_Request):
    """How to fine-tune. Only ``supervised`` is offered."""

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: SupervisedRequest | None = None
    dpo: dict[str, Any] | None = None
    reinforcement: dict[str, Any] | None = None


class JobCreate(_Request):
    """Body of a new job."""

    model: str = Field(min_length=1)
    training_file: str = Field(min_length=1)
    validation_file: str | None = None
    suffix: Suffix | None = None
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    metadata: Metadata | None = None
    method: MethodRequest | None = None
    #: Deprecated by OpenAI in favour of ``method``.
    hyperparameters: HyperparameterRequest | None = None
    integrations: Integrations | None = None
    #: Ours; in OpenAI's client: ``extra_body={"peft": {...}}``.
    peft: PeftRequest = Field(default_factory=UoraRequest)
    #: Ours too.
    training: TrainingOptions = TrainingOptions()
    #: Ours too: what the rows of the files are, and what is learned from them.
    task: Task = "chat"

    _peft_as_sent: frozenset[str] = PrivateAttr(frozenset())

    @model_validator(mode="wrap")
    @classmethod
    def _remember_peft(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        made = handler(value)
        if isinstance(value, Mapping) and isinstance(peft := value.get("peft"), Mapping):
            made._peft_as_sent = frozenset(peft)
        return made

    @property
    def adapter_as_sent(self) -> dict[str, Any]:
        """The settings of ``peft`` that the client named; a method that nobody named is not among them."""
        return self.peft.adapter().model_dump(mode="json", include=set(self._peft_as_sent))


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


class SupervisedMethod(BaseModel):
    """Settings of supervised fine-tuning."""

    hyperparameters: dict[str, Any]


class Method(BaseModel):
    """How the job fine-tunes."""

    type: Literal["supervised"] = "supervised"
    supervised: SupervisedMethod


class FineTuningJob(Shown):
    """OpenAI's job, and keys of ours from ``progress`` on."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: str
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    hyperparameters: dict[str, Any]
    method: Method
    seed: int
    result_files: list[str]
    integrations: list[dict[str, Any]] | None = None
    metadata: dict[str, str] | None
    error: JobError | None
    #: Percent, step, loss, speed and seconds left, learning rate and gradient norm of the latest step.
    progress: dict[str, Any] | None
    #: Queued jobs before it, itself included; None for a job that does not wait in the queue.
    queue_position: int | None
    #: What is trained: the method and its settings, with the learning rate once it is settled.
    adapter: dict[str, Any]
    task: str
    #: How it is trained (``uora.spec.TrainingOptions``).
    options: dict[str, Any]
    #: What was found in the files, once they were checked.
    dataset_report: dict[str, Any] | None
    stopped_early: bool | None
    #: Step of the checkpoint with the lowest validation loss.
    best_step: int | None
    #: The sweep that it was made for.
    sweep: str | None
    #: The job that it is a retry or a clone of.
    origin_job: str | None

    @classmethod
    def of(cls, job: Job, *, place: int | None = None) -> Self:
        """Show a row, with its place in the queue."""
        hyperparameters = _hyperparameters(job)
        return cls(
            id=job.id,
            created_at=_epoch(job.created_at),
            finished_at=_epoch_or_none(job.finished_at),
            estimated_finish=_epoch_or_none(job.estimated_finish),
            model=job.model,
            fine_tuned_model=job.fine_tuned_model,
            organization_id=job.project_id,
            status=job.status,
            trained_tokens=job.trained_tokens,
            training_file=job.training_file,
            validation_file=job.validation_file,
            hyperparameters=hyperparameters,
            method=Method(supervised=SupervisedMethod(hyperparameters=hyperparameters)),
            seed=job.seed,
            result_files=job.result_files,
            metadata=job.labels,
            integrations=job.integrations,
            error=None if job.error is None else JobError(**job.error),
            progress=_progress(job),
            queue_position=place,
            adapter={**job.adapter, "learning_rate": _learning_rate(job)},
            task=job.task,
            options=job.options,
            dataset_report=job.dataset_report,
            stopped_early=job.stopped_early,
            best_step=job.best_step,
            sweep=job.sweep_id,
            origin_job=job.origin_job,
        )


class JobState(Shown):
    """What of a job changes while it is worked on."""

    id: str
    object: Literal["fine_tuning.job.state"] = "fine_tuning.job.state"
    status: str
    progress: dict[str, Any] | None
    queue_position: int | None
    estimated_finish: int | None
    #: Higher after each change of the job.
    version: int

    @classmethod
    def of(cls, job: Job, *, place: int | None) -> Self:
        """Show a row, with its place in the queue."""
        return cls(
            id=job.id,
            status=job.status,
            progress=_progress(job),
            queue_position=place,
            estimated_finish=_epoch_or_none(job.estimated_finish),
            version=job.version,
        )


class JobStates(BaseModel):
    """States of those of the named jobs that there are."""

    object: Literal["list"] = "list"
    data: list[JobState]


class JobDeleted(BaseModel):
    """Answer to a deletion."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    deleted: bool = True


class JobPlan(BaseModel):
    """What a request would make, had it not been a trial: fields of the job that are settled before it is made."""

    object: Literal["fine_tuning.job.plan"] = "fine_tuning.job.plan"
    model: str
    base_model: str
    #: The name of the model that it would make, but for the end, which is the job's.
    fine_tuned_model: str
    training_file: str
    validation_file: str | None
    hyperparameters: dict[str, Any]
    method: Method
    #: As asked for; a trial draws none.
    seed: int | None
    metadata: dict[str, str] | None
    adapter: dict[str, Any]
    task: str
    options: dict[str, Any]

    @classmethod
    def of(cls, job: Job, *, seed: int | None, name: str) -> Self:
        """Show a job that was not made."""
        hyperparameters = _hyperparameters(job)
        return cls(
            model=job.model,
            base_model=job.base_model,
            fine_tuned_model=name,
            training_file=job.training_file,
            validation_file=job.validation_file,
            hyperparameters=hyperparameters,
            method=Method(supervised=SupervisedMethod(hyperparameters=hyperparameters)),
            seed=seed,
            metadata=job.labels,
            adapter={**job.adapter, "learning_rate": _learning_rate(job)},
            task=job.task,
            options=job.options,
        )


class FineTuningJobEvent(Shown):
    """OpenAI's event."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: str
    message: str
    type: str
    data: dict[str, Any] | None

    @classmethod
    def of(cls, event: JobEvent) -> Self:
        """Show a row."""
        return cls(
            id=event.id,
            created_at=_epoch(event.created_at),
            level=event.level,
            message=event.message,
            type=event.type,
            data=event.data,
        )


class FineTuningJobCheckpoint(Shown):
    """OpenAI's checkpoint."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, Any]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """Show a row."""
        return cls(
            id=checkpoint.id,
            created_at=_epoch(checkpoint.created_at),
            fine_tuned_model_checkpoint=checkpoint.model_name,
            fine_tuning_job_id=checkpoint.job_id,
            step_number=checkpoint.step_number,
            metrics=checkpoint.metrics,
        )


def _progress(job: Job) -> dict[str, Any] | None:
    """The latest step's numbers, and how much is done; all of it where the run ended before its last step."""
    if job.progress is None:
        return None
    share = job.progress["step"] / max(job.progress["total_steps"], 1)
    return {"percent": 100.0 if job.status == JobStatus.SUCCEEDED else round(100 * share, 1), **job.progress}


def _hyperparameters(job: Job) -> dict[str, Any]:
    """As they are run once that is settled, else as asked for."""
    settled: dict[str, Any] = (job.training_spec or {}).get("hyperparameters", job.hyperparameters)
    return settled


def _learning_rate(job: Job) -> float | None:
    settled: float | None = (job.training_spec or {}).get("learning_rate", job.learning_rate)
    return settled


def _epoch(moment: datetime) -> int:
    return int(moment.timestamp())


def _epoch_or_none(moment: datetime | None) -> int | None:
    return None if moment is None else _epoch(moment)
