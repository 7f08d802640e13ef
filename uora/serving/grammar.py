"""Constrained decoding: answers that are JSON, or JSON of a schema, by masks over the vocabulary (ADR 15)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits
from llguidance.hf import from_tokenizer
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from uora.errors import GenerationError, SchemaError

#: A schema's JSON text. The OpenAI API allows 120,000 characters of names and values.
MAX_SCHEMA_BYTES = 131_072
#: Compiled grammars that are kept.
CACHED_GRAMMARS = 32
#: Partial schemas that are tried, to name the place of an error.
_MAX_PLACES_TRIED = 200
# Between two parts of JSON: a space or two, or a new line and its indentation. A model cannot go on with it forever.
_WHITESPACE = r"\x20{1,2}|\r?\n[\x20\x09]{0,32}"
# Given in full: what is left out could be set by the schema itself, under "x-guidance".
_OPTIONS: Any = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": _WHITESPACE,
    "coerce_one_of": False,
    "lenient": False,
}
# States take 1 to 2 kB each. Errors must not repeat the schema.
_LIMITS = LLParserLimits(max_lexer_states=20_000, verbose_errors=False)
_SUPPORTED = (
    "Supported are type, enum, const, properties, required, additionalProperties, patternProperties, items, "
    "prefixItems, minItems, maxItems, minLength, maxLength, pattern without look-around, the usual formats, minimum, "
    "maximum, exclusiveMinimum, exclusiveMaximum, multipleOf, anyOf, allOf, oneOf of alternatives that exclude one "
    "another, and $ref within the schema"
)


class Matcher:
    """How far one answer has got in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def finished(self) -> bool:
        """Whether the answer is complete and nothing but its end can follow."""
        return self._matcher.is_stopped()

    def fill(self, bits: NDArray[np.int32]) -> None:
        """Set a bit for each token that may come next, the lowest bit first: ``(ceil(vocabulary / 32),)``.

        An end token may come where the grammar may end.

        Raises:
            GenerationError: no token may, or the grammar takes too much work here.
        """
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        self._check()
        if not bits.any():
            raise GenerationError("The response format allows no token here; make it simpler or try again.")

    def accept(self, token: int) -> None:
        """Go on by one token.

        Raises:
            GenerationError: the grammar does not allow it.
        """
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            found = self._matcher.get_error().splitlines()[0]
            raise GenerationError(f"The answer cannot be kept in its response format: {found}. Make it simpler.")


class Grammar:
    """A compiled constraint, shareable between answers."""

    def __init__(self, compiled: LLMatcher) -> None:
        self._compiled = compiled

    def matcher(self) -> Matcher:
        """At the beginning of an answer."""
        return Matcher(self._compiled.deep_copy())


class Grammars:
    """The grammars over one tokenizer's tokens. May be used from several threads.

    Args:
        tokenizer: fast, byte-level or SentencePiece's.
        vocabulary: width of the model's logits, which may exceed the tokenizer's.
        end_tokens: tokens that end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocabulary: int, end_tokens: frozenset[int]) -> None:
        self._tokenizer = from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=sorted(end_tokens))
        self._cached = lru_cache(maxsize=CACHED_GRAMMARS)(self._compile)

    def json_object(self) -> Grammar:
        """Any JSON object."""
        return self._cached('{"type": "object"}')

    def json_schema(self, schema: Mapping[str, Any]) -> Grammar:
        """JSON that a schema describes, properties in the schema's order.

        Raises:
            SchemaError: it is invalid, uses what is not supported, describes nothing or is too large.
        """
        try:
            text = json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise SchemaError(f"The JSON schema is no JSON: {error}. Send a JSON object.") from error
        if len(text) > MAX_SCHEMA_BYTES:
            raise SchemaError(
                f"The JSON schema has {len(text):,} bytes, at most {MAX_SCHEMA_BYTES:,} are taken; make it smaller."
            )
        return self._cached(text)

    def _compile(self, text: str) -> Grammar:
        matcher, problem = self._try(text)
        if matcher is None:
            place = self._place(json.loads(text), problem)
            raise SchemaError(f"The JSON schema cannot be used, at {place}: {problem}. {_SUPPORTED}.")
        return Grammar(matcher)

    def _try(self, text: str) -> tuple[LLMatcher | None, str]:
        """The compiled schema, or what is wrong with it."""
        try:
            matcher = LLMatcher(
                self._tokenizer,
                LLMatcher.grammar_from_json_schema(text, overrides=_OPTIONS),
                log_level=0,
                limits=_LIMITS,
            )
        except ValueError as error:  # nested too deeply, or no object
            return None, str(error)
        if matcher.is_error():
            return None, " ".join(matcher.get_error().split())
        first = matcher.deep_copy()
        first.compute_bitmask()
        if first.is_error() or first.is_stopped():
            return None, "no JSON is described, or it takes too much work to find out"
        return matcher, ""

    def _place(self, schema: dict[str, Any], problem: str) -> str:
        """JSON pointer of the smallest part of the schema with this problem, as the library names no place."""
        definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        place, parts = "#", _parts(schema)
        for _ in range(_MAX_PLACES_TRIED):
            step, inner = next(parts, ("", {}))
            if not step:
                break
            if self._try(json.dumps(definitions | inner))[1] == problem:
                place, parts = f"{place}/{step}", _parts(inner)
        return place


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The schemas directly within a schema, with the way to them."""
    for key, value in schema.items():
        match value:
            case dict() if key in ("properties", "patternProperties", "$defs", "definitions"):
                yield from ((f"{key}/{name}", inner) for name, inner in value.items() if isinstance(inner, dict))
            case dict() if key in ("items", "additionalProperties", "not", "if", "then", "else"):
                yield key, value
            case list() if key in ("anyOf", "allOf", "oneOf", "prefixItems"):
                yield from ((f"{key}/{n}", inner) for n, inner in enumerate(value) if isinstance(inner, dict))
