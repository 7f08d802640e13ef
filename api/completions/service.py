"""What both kinds of completions share on the way to the engine: the model, and how its tokens are chosen."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session, sessionmaker
from starlette.concurrency import run_in_threadpool

from api.caller import Caller
from api.completions.engine import WRITING_TASKS, AdapterTarget, GenerateRequest
from api.completions.schemas import GenerationCreate, InlineAdapter
from api.errors import InvalidRequest, UnsupportedParameter
from api.models import service as models
from api.models.service import ServedModel
from api.settings import Settings


@dataclass(frozen=True)
class Target:
    """The model that must answer, by the name it was asked for, and the project that asks."""

    name: str
    base_model: str
    adapter: AdapterTarget | None
    project: str


async def resolve(
    sessions: sessionmaker[Session], caller: Caller, body: GenerationCreate, *, settings: Settings
) -> Target:
    """Look the model up in a session that is closed before anything is generated.

    A digest comes from a row of the caller's project, never from the request: an adapter that another project sent
    along is out of reach, though the engine may hold it.

    Raises:
        ModelNotFound: neither a base model nor one of the project's.
        InvalidRequest: the model writes no text, or the adapter that came with the request cannot be used.
    """

    def look_up() -> Target:
        with sessions() as session:
            served = models.resolve(session, caller, name=body.model, base_models=settings.base_models)
        _check_task(served)
        adapter = None if served.adapter is None else AdapterTarget(id=served.adapter.id, digest=served.adapter.digest)
        if body.adapter is not None:
            if adapter is not None:
                raise InvalidRequest(
                    f"adapter: {body.model!r} is a fine-tuned model; name the base model that the adapter belongs to.",
                    param="adapter",
                )
            adapter = _read_inline(body.adapter, max_bytes=settings.max_inline_adapter_bytes)
        return Target(served.name, served.base_model, adapter, caller.project_id)

    return await run_in_threadpool(look_up)


def _check_task(served: ServedModel) -> None:
    if served.task not in WRITING_TASKS:
        raise InvalidRequest(
            f"The model {served.name} was trained for {served.task} and writes no text; expected a base model, or one "
            f"trained for {' or '.join(WRITING_TASKS)}.",
            param="model",
            code="model_not_supported",
        )


def _read_inline(adapter: InlineAdapter, *, max_bytes: int) -> AdapterTarget:
    """Check the size of an adapter that came with a request; what is in it, the engine checks."""
    try:
        size = len(base64.b64decode(adapter.data, validate=True))
    except ValueError as error:
        raise InvalidRequest(f"adapter.data is not valid base64: {error}.", param="adapter.data") from error
    if size > max_bytes:
        raise InvalidRequest(
            f"adapter.data: found {size} bytes; expected at most {max_bytes}.",
            param="adapter.data",
            code="adapter_too_large",
        )
    return AdapterTarget(id="(sent with the request)", data=adapter.data)


def refuse_unsupported(body: GenerationCreate, neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse what would have to be ignored.

    Args:
        body: the request; its extra keys are those that its schema does not know.
        neutral: OpenAI's parameters that are not offered, with the values that ask for nothing (null always does).

    Raises:
        UnsupportedParameter: one of them asks for something.
        InvalidRequest: a key is none of OpenAI's, or goes with streams only.
    """
    for name, value in (body.model_extra or {}).items():
        if name not in neutral:
            raise InvalidRequest(
                f"Unknown parameter {name}; check its spelling or leave it out.",
                param=name,
                code="unknown_parameter",
            )
        if value is not None and value not in neutral[name]:
            raise UnsupportedParameter(f"{name} is not supported yet; leave it out.", param=name)
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options goes with stream=true only.", param="stream_options")


def to_engine(body: GenerationCreate, target: Target, *, deadline_seconds: float, **own: Any) -> GenerateRequest:
    """The engine's request; ``own`` are the fields that only one kind of completion fills."""
    return GenerateRequest(
        base_model=target.base_model,
        adapter=target.adapter,
        project=target.project,
        n=body.n or 1,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=body.seed,
        stop=[body.stop] if isinstance(body.stop, str) else body.stop or [],
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=body.logit_bias or {},
        deadline_seconds=deadline_seconds,
        **own,
    )


def check_choices(request: GenerateRequest, *, max_rows: int) -> None:
    """Refuse more answers than the engine can decode together.

    Raises:
        InvalidRequest: there are more.
    """
    if request.choices > max_rows:
        prompts = len(request.prompts or [()])
        found = f"{request.n}" if prompts == 1 else f"{request.n} for each of {prompts} prompts"
        raise InvalidRequest(f"n: found {found}; expected at most {max_rows} answers to a request.", param="n")
