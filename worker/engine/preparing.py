"""From the api's request to what the scheduler takes: the adapter, token ids and sampling, or a refusal."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from api.completions.engine import AdapterTarget, GenerateRequest, JsonFormat
from uora.artifact import Artifact, Manifest, loads
from uora.data.completions import prompt_ids
from uora.data.templates import render
from uora.errors import AdapterNotFoundError, SamplingError, UoraError
from uora.serving.grammar import Grammar
from uora.serving.rows import Row
from uora.serving.sampling import Sampling
from worker.engine.checking import check_template, check_writer, no_template
from worker.engine.errors import EngineError
from worker.engine.runner import Runner

log = structlog.get_logger()


@dataclass(frozen=True)
class Prompt:
    """Token ids, the text to echo (empty if none was asked for), and how many tokens may follow."""

    ids: list[int]
    echo: str
    max_tokens: int


@dataclass(frozen=True)
class Prepared:
    """A request that can be queued.

    Attributes:
        manifest: of the adapter that answers; None for the base model.
        artifact: the adapter, if it has to be made resident.
        row: the adapter's, if it is resident; it answers even if it leaves the bank meanwhile.
        prompts: one for a conversation.
        sampling: of the first answer; those after it have other seeds.
    """

    manifest: Manifest | None
    artifact: Artifact | None
    row: Row | None
    prompts: list[Prompt]
    sampling: Sampling


def prepare(runner: Runner, body: GenerateRequest) -> Prepared:
    """Load and check all that a request names.

    Raises:
        EngineError: something is not there, does not belong here, or does not fit.
    """
    if body.base_model != runner.base.name:
        raise EngineError(404, "model_not_found", f"This engine serves {runner.base.name}, not {body.base_model}.")
    artifact = row = manifest = None
    if body.adapter is not None:
        row = runner.bank.find(body.adapter.digest or "")
        artifact = None if row else _verified(runner, body.adapter)
        manifest = row.manifest if row else artifact.manifest if artifact else None
    if manifest is not None and body.adapter is not None and body.messages is not None:
        check_template(manifest, runner.template_sha256, param=_param(body.adapter))
    return Prepared(manifest, artifact, row, _prompts(runner, body), _sampling(runner, body))


def _verified(runner: Runner, target: AdapterTarget) -> Artifact:
    """An adapter that is not resident."""
    try:
        artifact = loads(base64.b64decode(target.data)) if target.data else _load(runner, target)
        check_writer(artifact.manifest, runner.bank, runner.template_sha256, param=_param(target))
    except AdapterNotFoundError as error:
        raise EngineError(404, error.code, error.message) from error
    except UoraError as error:
        if target.data:  # what the client sent is the client's to mend
            raise EngineError(400, error.code, f"adapter.data: {error.message}", param="adapter.data") from error
        log.exception("adapter_refused", model=target.id)
        raise EngineError(500, error.code, error.message) from error
    return artifact


def _load(runner: Runner, target: AdapterTarget) -> Artifact:
    return runner.store.load(target.id, target.digest or "")


def _param(target: AdapterTarget) -> str:
    return "adapter.data" if target.data else "model"


def _prompts(runner: Runner, body: GenerateRequest) -> list[Prompt]:
    if body.messages is not None:
        return [_fit(runner, body, _render(runner, body), param="messages")]
    prompts = body.prompts or []
    names = ["prompt"] if len(prompts) == 1 else [f"prompt[{position}]" for position in range(len(prompts))]
    return [_raw(runner, body, prompt, param=name) for prompt, name in zip(prompts, names, strict=True)]


def _render(runner: Runner, body: GenerateRequest) -> list[int]:
    if runner.template_sha256 is None:
        raise no_template("messages")
    messages = [message.model_dump() for message in body.messages or ()]
    try:
        return render(runner.tokenizer, messages, add_generation_prompt=True)
    except UoraError as error:
        raise EngineError(400, "invalid_messages", error.message, param="messages") from error


def _raw(runner: Runner, body: GenerateRequest, prompt: str | list[int], *, param: str) -> Prompt:
    """A raw prompt, exactly as rows of prompts and completions are in training (`prompt_ids`).

    As there, a special token's name in a text is that token, and the token that begins a text comes first where the
    tokenizer has one. Token ids are taken as they are.
    """
    if isinstance(prompt, str):
        return _fit(runner, body, prompt_ids(runner.tokenizer, prompt), param=param, text=prompt)
    _check_ids(runner, prompt, param=param)
    text = str(runner.tokenizer.decode(prompt)) if body.echo else ""
    return _fit(runner, body, prompt, param=param, text=text)


def _fit(runner: Runner, body: GenerateRequest, ids: list[int], *, param: str, text: str = "") -> Prompt:
    if not ids:
        raise EngineError(400, "empty_prompt", f"{param}: found an empty prompt; expected one token.", param=param)
    room = runner.context - len(ids)
    if room < 1 or (body.max_tokens or 1) > room:
        raise EngineError(
            400,
            "context_length_exceeded",
            f"This model's context is {runner.context} tokens; {param} has {len(ids)}"
            + (f" and {body.max_tokens} were asked for the answer" if body.max_tokens else "")
            + ". Shorten it or lower max_tokens.",
            param=param,
        )
    return Prompt(ids, text if body.echo else "", body.max_tokens or room)


def _check_ids(runner: Runner, ids: Sequence[int], *, param: str) -> None:
    """Raises `EngineError` for a token that the vocabulary has not."""
    vocabulary = len(runner.tokenizer)
    wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise EngineError(
            400,
            "invalid_token",
            f"{param}: found token {wrong}; the vocabulary has tokens 0 to {vocabulary - 1}.",
            param=param,
        )


def _sampling(runner: Runner, body: GenerateRequest) -> Sampling:
    _check_ids(runner, list(body.logit_bias), param="logit_bias")
    return Sampling(
        temperature=body.temperature,
        top_p=body.top_p,
        seed=body.seed,
        stop=tuple(body.stop),
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=body.logit_bias,
        top_logprobs=body.top_logprobs,
        grammar=None if body.response_format is None else _grammar(runner, body.response_format),
    )


def _grammar(runner: Runner, wanted: JsonFormat) -> Grammar:
    """Compile what the answer has to match."""
    schema = wanted.json_schema
    try:
        return runner.grammars.json_object() if schema is None else runner.grammars.json_schema(schema)
    except SamplingError as error:
        raise EngineError(400, error.code, error.message, param="response_format") from error
