"""``/v1/chat/completions``"""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from api.auth import CallerDep
from api.completions import service
from api.completions.responses import EventStream, unless_disconnected
from api.completions.schemas import ChatCompletion, ChatCompletionCreate
from api.completions.service import Generation
from api.dependencies import ResourcesDep

router = APIRouter(prefix="/chat/completions", tags=["inference"])


@router.post("", response_model=ChatCompletion)
async def create_chat_completion(
    request: Request, body: ChatCompletionCreate, caller: CallerDep, resources: ResourcesDep
) -> ChatCompletion | Response:
    """Answer a conversation with a base model or one of the project's models."""
    settings = resources.settings
    served = await service.resolve(resources.read_sessions, caller, name=body.model, settings=settings)
    generate = service.to_engine(body, served, max_rows=settings.engine_max_rows)
    if body.stream:
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        begin = Generation.begin(resources.engine, generate, model=served.name)
        generation = await unless_disconnected(request, begin)
        return EventStream(generation.stream(include_usage=include_usage), close=generation.close)
    return await unless_disconnected(request, service.complete(resources.engine, generate, model=served.name))
