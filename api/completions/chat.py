"""Chat completions: OpenAI's conversation to the engine's, and choices that are messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from api.completions import service
from api.completions.engine import Delta, Finish, GenerateRequest, JsonFormat, Message, TokenLogprob
from api.completions.generation import Answer
from api.completions.schemas import ChatCompletionCreate, ChatMessage, JsonSchemaFormat, ResponseFormat, TextFormat
from api.completions.service import Target
from api.errors import InvalidRequest, UnsupportedParameter

#: OpenAI's parameters that are not offered, with the values that ask for nothing (null always does).
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
#: What an assistant message of OpenAI's clients carries beside its text, empty unless it called a tool.
EMPTY: tuple[Any, ...] = (None, [], {}, "")


def to_engine(body: ChatCompletionCreate, target: Target, *, deadline_seconds: float) -> GenerateRequest:
    """Translate a request.

    Raises:
        UnsupportedParameter: it asks for something that would have to be ignored.
        InvalidRequest: its parameters contradict each other.
    """
    service.refuse_unsupported(body, NEUTRAL)
    _refuse_extras(body.messages)
    return service.to_engine(
        body,
        target,
        deadline_seconds=deadline_seconds,
        messages=[_message(message) for message in body.messages],
        max_tokens=_max_tokens(body),
        top_logprobs=_top_logprobs(body),
        response_format=_json_format(body.response_format),
    )


class ChatDialect:
    """Choices as messages, and as deltas of messages."""

    id_prefix = "chatcmpl-"
    whole = "chat.completion"
    piece = "chat.completion.chunk"

    def opening(self, index: int) -> list[dict[str, Any]]:
        """The role comes first, and alone."""
        return [_streamed(index, {"role": "assistant", "content": "", "refusal": None})]

    def part(self, event: Delta | Finish) -> dict[str, Any]:
        """More text, or the reason why there is no more."""
        if isinstance(event, Delta):
            return _streamed(event.index, {"content": event.text}, logprobs=_logprobs(event.logprobs))
        return _streamed(event.index, {}, finish_reason=event.finish_reason)

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """A message."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": "".join(answer.texts), "refusal": None},
            "finish_reason": answer.finish_reason,
            "logprobs": _logprobs(answer.logprobs),
        }


def _streamed(
    index: int, delta: dict[str, Any], *, finish_reason: str | None = None, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": logprobs}


def _logprobs(tokens: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
    if not tokens:
        return None
    content = [_token(token) | {"top_logprobs": [_token(top) for top in token.top or ()]} for token in tokens]
    return {"content": content, "refusal": None}


def _token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.token, "bytes": token.bytes, "logprob": token.logprob}


def _refuse_extras(messages: Sequence[ChatMessage]) -> None:
    for position, message in enumerate(messages):
        for name, value in (message.model_extra or {}).items():
            if value not in EMPTY:
                param = f"messages[{position}].{name}"
                raise UnsupportedParameter(f"{param} is not supported yet; leave it out.", param=param)


def _message(message: ChatMessage) -> Message:
    """Templates know ``system``, not its newer name ``developer``; text parts are lines."""
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return Message(role=role, content=message.content)
    return Message(role=role, content="\n".join(part.text for part in message.content))


def _max_tokens(body: ChatCompletionCreate) -> int | None:
    older, newer = body.max_tokens, body.max_completion_tokens
    if older is not None and newer is not None and older != newer:
        raise InvalidRequest(
            f"Found max_tokens {older} and max_completion_tokens {newer}; give the latter only.",
            param="max_tokens",
        )
    return older if newer is None else newer


def _top_logprobs(body: ChatCompletionCreate) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise InvalidRequest("top_logprobs goes with logprobs=true only.", param="top_logprobs")
    return None


def _json_format(wanted: ResponseFormat | None) -> JsonFormat | None:
    if wanted is None or isinstance(wanted, TextFormat):
        return None
    return JsonFormat(json_schema=wanted.json_schema.schema_ if isinstance(wanted, JsonSchemaFormat) else None)
