"""``/v1/chat/completions`` and ``/v1/completions``"""

from __future__ import annotations

from typing import Annotated

from fastapi import Header, Request
from starlette.responses import JSONResponse, Response

from api.completions import chat, legacy, service
from api.completions.chat import ChatDialect
from api.completions.engine import GenerateRequest
from api.completions.generation import Dialect, Generation
from api.completions.legacy import LegacyDialect
from api.completions.responses import EventStream, unless_disconnected
from api.completions.schemas import (
    ChatCompletion,
    ChatCompletionCreate,
    Completion,
    CompletionCreate,
    GenerationCreate,
)
from api.dependencies import ResourcesDep
from api.quotas.dependencies import AdmittedCallerDep
from api.resources import Resources
from api.routing import Router
from api.usage.ledger import Meter
from api.usage.models import Operation

router = Router(tags=["inference"])

#: Seconds that the answer may take; ``engine_timeout`` at most.
TimeoutHeader = Annotated[float | None, Header(alias="x-request-timeout-seconds", gt=0, allow_inf_nan=False)]


@router.post("/chat/completions", response_model=ChatCompletion)
async def create_chat_completion(
    request: Request,
    body: ChatCompletionCreate,
    caller: AdmittedCallerDep,
    resources: ResourcesDep,
    timeout: TimeoutHeader = None,
) -> Response:
    """Answer a conversation with a base model or one of the project's models."""
    target = await service.resolve(resources.read_sessions, caller, body, settings=resources.settings)
    generate = chat.to_engine(body, target, deadline_seconds=_deadline(resources, timeout))
    meter = Meter(resources.usage, caller, body.model, Operation.CHAT)
    return await _answer(request, body, resources, generate, ChatDialect(), meter)


@router.post("/completions", response_model=Completion)
async def create_completion(
    request: Request,
    body: CompletionCreate,
    caller: AdmittedCallerDep,
    resources: ResourcesDep,
    timeout: TimeoutHeader = None,
) -> Response:
    """Go on from raw prompts with a base model or one of the project's models."""
    target = await service.resolve(resources.read_sessions, caller, body, settings=resources.settings)
    generate = legacy.to_engine(body, target, deadline_seconds=_deadline(resources, timeout))
    meter = Meter(resources.usage, caller, body.model, Operation.COMPLETION)
    return await _answer(request, body, resources, generate, LegacyDialect(), meter)


def _deadline(resources: Resources, asked: float | None) -> float:
    longest = resources.settings.engine_timeout.total_seconds()
    return longest if asked is None else min(asked, longest)


async def _answer(
    request: Request,
    body: GenerationCreate,
    resources: Resources,
    generate: GenerateRequest,
    dialect: Dialect,
    meter: Meter,
) -> Response:
    service.check_choices(generate, max_rows=resources.settings.engine_max_rows)
    begin = Generation.begin(resources.engine, generate, dialect=dialect, meter=meter, model=body.model)
    generation = await unless_disconnected(request, begin)

    async def close() -> None:
        await generation.close()
        await resources.limits.spend(meter.caller, meter.tokens)

    if body.stream:
        events = generation.stream(include_usage=body.include_usage)
        return EventStream(events, close=close, headers=generation.headers)
    try:
        return JSONResponse(await unless_disconnected(request, generation.collect()), headers=generation.headers)
    finally:
        await close()
