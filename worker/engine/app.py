"""The engine's HTTP side, for the api only: ``uvicorn --factory worker.engine.app:create_app``."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

import structlog
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from api.classifications.engine import ClassifyAnswer, ClassifyRequest
from api.completions.engine import AdapterTarget, Failure, Finish, GenerateRequest, Message, Start
from api.completions.engine import Delta as DeltaLine
from api.completions.responses import unless_disconnected
from api.database import make_engine, make_sessions
from api.errors import ClientGone
from api.settings import Settings
from api.telemetry import configure_logging
from uora.artifact import Artifact
from uora.data.templates import render
from uora.errors import AdapterNotFoundError, ArtifactError, UoraError
from uora.serving.generation import Delta, Generation, Sampling
from worker.engine import classify as classes
from worker.engine.errors import EngineError
from worker.engine.provenance import fingerprint
from worker.engine.registration import Description, Registration
from worker.engine.runner import Runner, Served, build_runner
from worker.engine.scheduler import EngineBusyError, EngineStoppedError

log = structlog.get_logger()


def create_app(settings: Settings | None = None, build: Callable[[Settings], Served] = build_runner) -> FastAPI:
    """The engine's app. The base model is loaded before the first request is taken."""
    settings = settings or Settings()
    configure_logging()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        runner = await run_in_threadpool(build, settings)
        runner.start()
        app.state.runner = runner
        registration = app.state.registration = _registration(settings, runner)
        registration.start()
        yield
        await run_in_threadpool(registration.stop)
        await run_in_threadpool(runner.stop)

    app = FastAPI(lifespan=lifespan, openapi_url=None)
    app.state.token = settings.engine_token.get_secret_value()
    app.add_exception_handler(EngineError, _engine_error)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.get("/healthz")(healthz)
    app.get("/readyz")(readyz)
    app.post("/generate", dependencies=[Depends(_authenticate)])(generate)
    app.post("/classify", dependencies=[Depends(_authenticate)], response_model=ClassifyAnswer)(classify)
    return app


def _registration(settings: Settings, runner: Served) -> Registration:
    description = Description(
        url=settings.engine_advertise_url,
        base_model=runner.base.name,
        base_digest=runner.base.digest,
        capacity=settings.engine_max_rows,
    )
    return Registration(
        make_sessions(make_engine(settings.database_url)),
        description,
        load=runner.load,
        interval=settings.engine_heartbeat_interval,
    )


def _authenticate(request: Request) -> None:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(token.encode(), request.app.state.token.encode()):
        raise EngineError(401, "invalid_engine_token", "The engine token is missing or wrong; check UORA_ENGINE_TOKEN.")


def _error_body(code: str, message: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"code": code, "message": message, "param": param}}


async def _engine_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, EngineError)  # noqa: S101 # registered for this class only
    headers = {"Retry-After": "1"} if error.status == 503 else None
    return JSONResponse(_error_body(error.code, error.message, error.param), error.status, headers)


async def _invalid_request(_request: Request, error: Exception) -> JSONResponse:
    return JSONResponse(_error_body("invalid_request", str(error)), 400)


def healthz() -> dict[str, str]:
    """The process is alive."""
    return {"status": "ok"}


def readyz(request: Request) -> dict[str, str]:
    """The base model is loaded; ``id`` is the engine's in the database."""
    base = _runner(request).base
    return {
        "status": "ok",
        "id": request.app.state.registration.id,
        "base_model": base.name,
        "base_digest": base.digest,
    }


def _runner(request: Request) -> Served:
    runner: Served = request.app.state.runner
    return runner


def _text_runner(runner: Annotated[Served, Depends(_runner)]) -> Runner:
    if isinstance(runner, Runner):
        return runner
    message = f"The base model {runner.base.name} writes no text; use a model of texts that was trained for it."
    raise EngineError(400, "model_not_supported", message, param="model")


async def classify(
    request: Request, body: ClassifyRequest, served: Annotated[Served, Depends(_runner)]
) -> ClassifyAnswer | JSONResponse:
    """Give items their classes or numbers."""
    try:
        return await unless_disconnected(request, classes.classify(served, body))
    except ClientGone as error:
        return JSONResponse(_error_body(error.code, error.message), error.status)


async def generate(body: GenerateRequest, runner: Annotated[Runner, Depends(_text_runner)]) -> StreamingResponse:
    """Generate answers as a stream of JSON lines (start, delta, finish, error)."""
    if body.base_model != runner.base.name:
        raise EngineError(404, "model_not_found", f"This engine serves {runner.base.name}, not {body.base_model}.")
    artifact = await run_in_threadpool(_load_adapter, runner, body.adapter) if body.adapter else None
    manifest = artifact.manifest if artifact else runner.bank.manifests.get(body.adapter.digest if body.adapter else "")
    prompt = await run_in_threadpool(_render, runner, body.messages)
    answers = _Answers(body, prompt, _max_tokens(body, len(prompt), runner.context))
    try:
        runner.scheduler.submit(answers.generations, artifact)
    except EngineBusyError:
        raise EngineError(503, "engine_busy", "Too many requests are waiting; try again in a moment.") from None
    except EngineStoppedError:
        raise EngineError(503, "engine_stopping", "The engine is shutting down; try again in a moment.") from None
    start = Start(prompt_tokens=len(prompt), system_fingerprint=fingerprint(runner.base.digest, manifest))
    return StreamingResponse(answers.lines(start), media_type="application/x-ndjson")


def _load_adapter(runner: Runner, reference: AdapterTarget) -> Artifact | None:
    """The adapter, verified; None if this very content is resident already."""
    if reference.digest in runner.bank:
        return None
    try:
        artifact = runner.store.load(reference.id, reference.digest)
        runner.bank.check(artifact.manifest)
        if artifact.manifest.chat_template_sha256 != runner.template_sha256:
            raise ArtifactError(
                f"Model {reference.id} was trained with another chat template than the engine's base model has. "
                "Serve it with the template it was trained with.",
                code="chat_template_mismatch",
            )
    except AdapterNotFoundError as error:
        raise EngineError(404, error.code, error.message) from error
    except ArtifactError as error:
        log.exception("adapter_refused", model=reference.id)
        raise EngineError(500, error.code, error.message) from error
    return artifact


def _render(runner: Runner, messages: list[Message]) -> list[int]:
    try:
        return render(runner.tokenizer, [m.model_dump() for m in messages], add_generation_prompt=True)
    except UoraError as error:
        raise EngineError(400, "invalid_messages", error.message, param="messages") from error


def _max_tokens(body: GenerateRequest, prompt_tokens: int, context: int) -> int:
    room = context - prompt_tokens
    if room < 1 or (body.max_tokens or 1) > room:
        raise EngineError(
            400,
            "context_length_exceeded",
            f"This model's context is {context} tokens; the messages have {prompt_tokens}"
            + (f" and {body.max_tokens} were asked for the answer" if body.max_tokens else "")
            + ". Shorten the messages or lower max_tokens.",
            param="messages",
        )
    return body.max_tokens or room


class _Answers:
    """The answers of one request, from the scheduler's thread to the response's event loop."""

    def __init__(self, body: GenerateRequest, prompt: list[int], max_tokens: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Delta | Exception]] = asyncio.Queue()
        self.generations = [
            Generation(
                prompt=prompt,
                adapter=body.adapter.digest if body.adapter else None,
                max_tokens=max_tokens,
                sampling=Sampling(
                    temperature=body.temperature,
                    top_p=body.top_p,
                    seed=None if body.seed is None else body.seed + index,
                    stop=tuple(body.stop),
                ),
                emit=self._emitter(index),
            )
            for index in range(body.n)
        ]

    def _emitter(self, index: int) -> Callable[[Delta | Exception], None]:
        def emit(item: Delta | Exception) -> None:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, item))

        return emit

    async def lines(self, start: Start) -> AsyncIterator[bytes]:
        """The response. Leaving it early, as when the client goes away, cancels what is still running."""
        try:
            yield _line(start)
            unfinished = len(self.generations)
            while unfinished:
                index, item = await self._queue.get()
                if isinstance(item, Exception):
                    yield _line(_failure(item))
                    return
                if item.text:
                    yield _line(DeltaLine(index=index, text=item.text))
                if item.finish_reason:
                    unfinished -= 1
                    yield _line(
                        Finish(
                            index=index,
                            finish_reason=item.finish_reason,
                            completion_tokens=item.completion_tokens,
                        )
                    )
        finally:
            for generation in self.generations:
                generation.cancelled = True


def _failure(error: Exception) -> Failure:
    if isinstance(error, EngineStoppedError):
        return Failure(code="engine_stopping", message="The engine is shutting down; try again.")
    if isinstance(error, UoraError):
        return Failure(code=error.code, message=error.message)
    log.error("generation_failed", exc_info=error)
    return Failure(code="generation_failed", message="The engine failed while generating.")


def _line(event: BaseModel) -> bytes:
    return event.model_dump_json().encode() + b"\n"
