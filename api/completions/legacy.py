"""OpenAI's older completions: raw prompts, and choices that are texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from api.completions import service
from api.completions.engine import Delta, Finish, GenerateRequest, TokenLogprob
from api.completions.generation import Answer
from api.completions.schemas import CompletionCreate
from api.completions.service import Target
from api.errors import InvalidRequest, UnsupportedParameter

#: As in ``chat.NEUTRAL``.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {"suffix": ("",)}
#: OpenAI's, which is small: these models do not end by themselves.
DEFAULT_MAX_TOKENS = 16


def to_engine(body: CompletionCreate, target: Target, *, deadline_seconds: float) -> GenerateRequest:
    """Translate a request.

    Raises:
        UnsupportedParameter: it asks for something that would have to be ignored.
        InvalidRequest: a prompt is empty.
    """
    service.refuse_unsupported(body, NEUTRAL)
    if body.best_of not in (None, body.n or 1):
        raise UnsupportedParameter("best_of is supported only where it equals n; leave it out.", param="best_of")
    if body.echo and body.logprobs is not None:
        raise UnsupportedParameter(
            "echo is not supported with logprobs: the prompt's log probabilities are not computed. Leave one out.",
            param="echo",
        )
    return service.to_engine(
        body,
        target,
        deadline_seconds=deadline_seconds,
        prompts=_prompts(body),
        max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
        echo=bool(body.echo),
        top_logprobs=body.logprobs,
    )


class LegacyDialect:
    """Choices as texts; those of a stream look the same."""

    id_prefix = "cmpl-"
    whole = piece = "text_completion"

    def __init__(self) -> None:
        self._offsets: Counter[int] = Counter()  # characters of each choice that tokens have begun

    def opening(self, index: int) -> tuple[()]:
        """Nothing comes before the text."""
        return ()

    def part(self, event: Delta | Finish) -> dict[str, Any]:
        """More text, or the reason why there is no more."""
        if isinstance(event, Delta):
            return _choice(event.index, event.text, logprobs=self._logprobs(event.index, event.logprobs))
        return _choice(event.index, "", finish_reason=event.finish_reason)

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """The whole text."""
        logprobs = self._logprobs(index, answer.logprobs)
        return _choice(index, "".join(answer.texts), finish_reason=answer.finish_reason, logprobs=logprobs)

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        if not tokens:
            return None
        return {
            "tokens": [token.token for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [_top(token) for token in tokens],
            "text_offset": [self._offset(index, token) for token in tokens],
        }

    def _offset(self, index: int, token: TokenLogprob) -> int:
        offset = self._offsets[index]
        # A token may end within a character: the character counts for the token that has its first byte.
        self._offsets[index] += sum(byte & 0xC0 != 0x80 for byte in token.bytes)
        return offset


def _choice(
    index: int, text: str, *, finish_reason: str | None = None, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _top(token: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens, and the chosen one even if it is none of them."""
    return {top.token: top.logprob for top in token.top or ()} | {token.token: token.logprob}


def _prompts(body: CompletionCreate) -> list[str | list[int]]:
    prompt = body.prompt
    one = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], int))
    prompts: list[Any] = [prompt] if one else list(prompt)
    for position, found in enumerate(prompts):
        if not found:
            raise _empty("prompt" if one else f"prompt[{position}]")
    if not prompts:
        raise _empty("prompt")
    return prompts


def _empty(param: str) -> InvalidRequest:
    return InvalidRequest(
        f"{param}: found an empty prompt; expected at least one character or token.", param=param, code="empty_prompt"
    )
