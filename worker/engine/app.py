"""The engine's HTTP side, for the api only: ``uvicorn --factory worker.engine.app:create_app``."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import chain, product
from typing import Annotated, Any

import structlog
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry
from pydantic import BaseModel
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool

from api.classifications.engine import ClassifyAnswer, ClassifyRequest
from api.completions.engine import Delta as DeltaLine
from api.completions.engine import Failure, Finish, GenerateRequest, Start
from api.completions.engine import TokenLogprob as TokenLogprobLine
from api.completions.responses import unless_disconnected
from api.database import make_engine, make_sessions
from api.errors import ClientGone
from api.metrics.exposition import REFUSAL, exposition, may_read, new_registry
from api.metrics.instruments import RequestMetrics
from api.middleware import RequestContext
from api.models.engine import BaseDescription, CheckRequest, DescribeRequest, ExportRequest
from api.settings import Settings
from api.stopping import Stopping
from api.telemetry import configure_logging
from api.tracing import configure_tracing, stop_tracing
from uora.errors import UoraError
from uora.serving.generation import Delta, Generation
from uora.serving.sampling import Sampling, TokenLogprob
from worker.engine import classify as classes
from worker.engine import exporting, importing
from worker.engine.errors import EngineError
from worker.engine.metrics import EngineCollector, EngineMetrics
from worker.engine.observing import Observed
from worker.engine.preparing import Prepared, prepare
from worker.engine.provenance import fingerprint, provenance
from worker.engine.registration import Description, Registration
from worker.engine.runner import Runner, Served, build_runner
from worker.engine.scheduler import EngineBusyError, EngineStoppedError

log = structlog.get_logger()

#: In the place of minus infinity, which JSON has not; OpenAI's.
_LEAST_LOGPROB = -9999.0


def create_app(settings: Settings | None = None, build: Callable[[Settings], Served] = build_runner) -> FastAPI:
    """The engine's app. The base model is loaded before the first request is taken."""
    settings = settings or Settings()
    configure_logging(level=settings.log_level, format=settings.log_format)
    registry, stopping = new_registry(), Stopping()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        configure_tracing("engine")
        runner = await run_in_threadpool(_built, build, settings)
        runner.start()
        app.state.runner = runner
        app.state.counted = _count(runner, registry)
        registration = app.state.registration = _registration(settings, runner)
        registration.start()
        # The server lets running answers end before it ends the lifespan: until then, nobody else is to come.
        stopping.on_signal(registration.leave, delay=settings.drain_delay)
        yield
        await run_in_threadpool(registration.stop)
        await run_in_threadpool(runner.stop)
        await run_in_threadpool(stop_tracing)

    app = FastAPI(lifespan=lifespan, openapi_url=None)
    app.state.cache_dir = settings.cache_dir
    app.state.metrics, app.state.stopping = registry, stopping
    app.state.metrics_token = settings.metrics_token
    app.state.token = settings.engine_token.get_secret_value()
    app.add_exception_handler(EngineError, _engine_error)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.get("/healthz")(healthz)
    app.get("/readyz", dependencies=[Depends(_stay)])(readyz)
    app.get("/metrics")(metrics)
    app.post("/generate", dependencies=[Depends(_authenticate), Depends(_stay)])(generate)
    app.post("/describe", dependencies=[Depends(_authenticate)])(describe)
    app.post("/check", dependencies=[Depends(_authenticate)])(check)
    app.post("/export", dependencies=[Depends(_authenticate), Depends(_stay)])(export)
    app.post("/classify", dependencies=[Depends(_authenticate), Depends(_stay)], response_model=ClassifyAnswer)(
        classify
    )
    app.add_middleware(RequestContext, metrics=RequestMetrics(registry), stopping=stopping, internal=True)
    return app


def _built(build: Callable[[Settings], Served], settings: Settings) -> Served:
    try:
        return build(settings)
    except UoraError as error:  # uvicorn ends the process with exit status 3
        log.error("engine_not_started", base_model=settings.engine_base_model, code=error.code, error=error.message)
        raise


def _count(runner: Served, registry: CollectorRegistry) -> EngineMetrics:
    counted = EngineMetrics(registry, base_model=runner.base.name)
    runner.classifying.on_batch = counted.on_pass
    if isinstance(runner, Runner):
        runner.scheduler.on_batch = counted.on_step
    registry.register(EngineCollector(runner))
    return counted


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


async def _stay(request: Request) -> None:
    """Refuse what comes after the signal to stop; the api asks another engine."""
    if request.app.state.stopping:
        raise _stopping()


def _stopping() -> EngineError:
    return EngineError(503, "engine_stopping", "The engine is shutting down; try again in a moment.")


def _error_body(code: str, message: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"code": code, "message": message, "param": param}}


async def _engine_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, EngineError)  # noqa: S101 # registered for this class only
    body = _error_body(error.code, error.message, error.param)
    if error.retry_after is not None:
        body["error"]["retry_after"] = error.retry_after
    return JSONResponse(body, error.status)


async def _invalid_request(_request: Request, error: Exception) -> JSONResponse:
    return JSONResponse(_error_body("invalid_request", str(error)), 400)


def healthz() -> dict[str, str]:
    """The process is alive."""
    return {"status": "ok"}


def readyz(request: Request) -> dict[str, str]:
    """The base model is loaded, and the engine stays; ``id`` is its own in the database."""
    base = _runner(request).base
    return {
        "status": "ok",
        "id": request.app.state.registration.id,
        "base_model": base.name,
        "base_digest": base.digest,
    }


def metrics(request: Request) -> Response:
    """What the engine counts, for whoever may read it."""
    client = request.client.host if request.client else None
    if not may_read(request.app.state.metrics_token, client=client, headers=request.headers):
        raise EngineError(401, "invalid_metrics_token", REFUSAL)
    return exposition(request.app.state.metrics, accept=request.headers.get("accept", ""))


def _runner(request: Request) -> Served:
    runner: Served = request.app.state.runner
    return runner


def _text_runner(runner: Annotated[Served, Depends(_runner)]) -> Runner:
    if isinstance(runner, Runner):
        return runner
    message = f"The base model {runner.base.name} writes no text; use a model of texts that was trained for it."
    raise EngineError(400, "model_not_supported", message, param="model")


def describe(_body: DescribeRequest, runner: Annotated[Runner, Depends(_text_runner)]) -> BaseDescription:
    """The base model, as an adapter for it must be."""
    return importing.describe(runner)


def check(body: CheckRequest, served: Annotated[Served, Depends(_runner)]) -> dict[str, str]:
    """Whether an adapter could be served."""
    importing.check(served, body)
    return {"status": "ok"}


async def export(
    request: Request, body: ExportRequest, served: Annotated[Served, Depends(_runner)]
) -> StreamingResponse:
    """A fine-tuned model in another form, as a zip."""
    pieces = exporting.export(served, body, cache_dir=request.app.state.cache_dir)
    first = await run_in_threadpool(next, pieces)  # with it, all that can fail has been done
    return StreamingResponse(_closing(chain([first], pieces), pieces), media_type="application/zip")


async def _closing(pieces: Iterator[bytes], source: Generator[bytes, None, None]) -> AsyncIterator[bytes]:
    """The pieces; ``source`` is closed with them, also when the client leaves."""
    try:
        async for piece in iterate_in_threadpool(pieces):
            yield piece
    finally:
        source.close()


async def classify(
    request: Request, body: ClassifyRequest, served: Annotated[Served, Depends(_runner)]
) -> ClassifyAnswer | JSONResponse:
    """Give items their classes or numbers."""
    try:
        return await unless_disconnected(request, classes.classify(served, body))
    except ClientGone as error:
        return JSONResponse(_error_body(error.code, error.message), error.status)


async def generate(
    request: Request, body: GenerateRequest, runner: Annotated[Runner, Depends(_text_runner)]
) -> StreamingResponse:
    """Generate answers as a stream of JSON lines (start, delta, finish, error)."""
    received = time.monotonic()
    counted: EngineMetrics = request.app.state.counted
    prepared = await run_in_threadpool(prepare, runner, body)
    answers = _Answers(body, prepared, Observed(counted, received))
    try:
        runner.scheduler.submit(answers.generations, prepared.artifact)
    except EngineBusyError as error:
        raise _busy(error) from None
    except EngineStoppedError:
        raise _stopping() from None
    counted.on_prompts(sum(len(prompt.ids) for prompt in prepared.prompts))
    start = Start(
        prompt_tokens=[len(prompt.ids) for prompt in prepared.prompts],
        system_fingerprint=fingerprint(runner.base.digest, prepared.manifest),
        provenance=provenance(runner.base.digest, prepared.manifest),
    )
    return StreamingResponse(answers.lines(start), media_type="application/x-ndjson")


def _busy(error: EngineBusyError) -> EngineError:
    if error.own_share:
        return EngineError(
            429,
            "rate_limit_exceeded",
            "Too many of the project's requests are waiting; try again in a moment.",
            retry_after=error.retry_after,
        )
    message = "Too many requests are waiting; try again in a moment."
    return EngineError(503, "engine_busy", message, retry_after=error.retry_after)


class _Answers:
    """The answers of one request, from the scheduler's thread to the response's event loop."""

    def __init__(self, body: GenerateRequest, prepared: Prepared, observed: Observed) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Delta | Exception]] = asyncio.Queue()
        deadline = None if body.deadline_seconds is None else time.monotonic() + body.deadline_seconds
        places = list(product(prepared.prompts, range(body.n)))
        self._observed = observed
        self._first: dict[int, float] = {}  # when the texts of answers began
        self._echoes = [prompt.echo for prompt, _ in places]
        self.generations = [
            Generation(
                prompt=prompt.ids,
                adapter=prepared.manifest.digest if prepared.manifest else None,
                max_tokens=prompt.max_tokens,
                sampling=_with_seed(prepared.sampling, answer),
                emit=self._emitter(index),
                project=body.project,
                deadline=deadline,
                row=prepared.row,
            )
            for index, (prompt, answer) in enumerate(places)
        ]

    def _emitter(self, index: int) -> Callable[[Delta | Exception], None]:
        def emit(item: Delta | Exception) -> None:
            if index not in self._first:
                self._first[index] = time.monotonic()
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, item))

        return emit

    async def lines(self, start: Start) -> AsyncIterator[bytes]:
        """The response. Leaving it early, as when the client goes away, cancels what is still running."""
        try:
            yield _line(start)
            for index, text in enumerate(self._echoes):
                if text:
                    yield _line(DeltaLine(index=index, text=text))
            unfinished = len(self.generations)
            while unfinished:
                written = b""
                for index, item in await self._arrived():
                    self._observe(index, item)
                    if isinstance(item, Exception):
                        yield written + _line(_failure(item))
                        return
                    written += _lines_of(index, item)
                    unfinished -= item.finish_reason is not None
                if written:
                    yield written
        finally:
            for generation in self.generations:
                generation.cancelled = True

    def _observe(self, index: int, item: Delta | Exception) -> None:
        if isinstance(item, Exception) or item.finish_reason:
            generation = self.generations[index]
            self._observed.end(generation.joined_at, self._first[index], tokens=len(generation.generated))

    async def _arrived(self) -> list[tuple[int, Delta | Exception]]:
        """All that has come by now, waiting for something: the answers of one step are written together."""
        items = [await self._queue.get()]
        while not self._queue.empty():
            items.append(self._queue.get_nowait())
        return items


def _with_seed(sampling: Sampling, answer: int) -> Sampling:
    """Of one of ``n`` answers: the same seed for all would make them the same."""
    return sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + answer)


def _lines_of(index: int, item: Delta) -> bytes:
    lines = b""
    if item.text or item.logprobs:
        logprobs = [_logprob(token) for token in item.logprobs] or None
        tokens = item.completion_tokens
        lines += _line(DeltaLine(index=index, text=item.text, logprobs=logprobs, completion_tokens=tokens))
    if item.finish_reason:
        finish = Finish(index=index, finish_reason=item.finish_reason, completion_tokens=item.completion_tokens)
        lines += _line(finish)
    return lines


def _logprob(token: TokenLogprob) -> TokenLogprobLine:
    return TokenLogprobLine(
        token=token.token,
        bytes=list(token.bytes),
        logprob=max(token.logprob, _LEAST_LOGPROB),
        top=[_logprob(top) for top in token.top] or None,
    )


def _failure(error: Exception) -> Failure:
    if isinstance(error, EngineStoppedError):
        return Failure(code="engine_stopping", message="The engine is shutting down; try again.")
    if isinstance(error, UoraError):
        return Failure(code=error.code, message=error.message)
    log.error("generation_failed", exc_info=error)
    return Failure(code="generation_failed", message="The engine failed while generating.")


def _line(event: BaseModel) -> bytes:
    return event.model_dump_json(exclude_none=True).encode() + b"\n"
