"""Constrained answers: whatever the model likes, what comes out is what was asked for."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import make_tiny_tokenizer
from uora.errors import SchemaError
from uora.serving.grammar import MAX_SCHEMA_BYTES, Grammar, Grammars
from uora.serving.sampling import Sampled, Sampler, Sampling, sample

TOKENIZER = make_tiny_tokenizer()
VOCABULARY = len(TOKENIZER) + 7
ENDS = frozenset({TOKENIZER.eos_token_id, TOKENIZER.convert_tokens_to_ids("<|endoftext|>")})
GRAMMARS = Grammars(TOKENIZER, VOCABULARY, ENDS)

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def allowed(grammar: Grammar, text: str) -> set[int] | None:
    """Tokens that may follow ``text``; None if the grammar does not allow the text itself."""
    matcher = grammar.matcher()
    bits = np.zeros(-(-VOCABULARY // 32), dtype=np.int32)
    for token in TOKENIZER.encode(text, add_special_tokens=False):
        matcher.fill(bits)
        if not np.unpackbits(bits.view(np.uint8), bitorder="little")[token]:
            return None
        matcher.accept(token)
    matcher.fill(bits)
    return set(np.unpackbits(bits.view(np.uint8), bitorder="little").nonzero()[0].tolist())


def write(sampling: Sampling, *, seed: int, favourite: str = "", limit: int = 200) -> tuple[list[int], bool]:
    """Tokens of a model of random logits that likes ``favourite``; and whether it came to an end."""
    generator = torch.Generator().manual_seed(seed)
    sampler = Sampler(sampling, vocabulary=VOCABULARY)
    tokens: list[int] = []
    while len(tokens) < limit:
        logits = torch.randn(1, VOCABULARY, generator=generator)
        logits[0, [TOKENIZER.convert_tokens_to_ids(c) for c in favourite]] += 20
        (result,) = sample(logits, [sampler])
        assert isinstance(result, Sampled), result
        if result.token in ENDS:
            return tokens, True
        tokens.append(result.token)
    return tokens, False


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 1.0, 2.0]))
def test_answers_match_their_schema(seed: int, temperature: float) -> None:
    grammar = GRAMMARS.json_schema(PERSON)
    tokens, ended = write(Sampling(temperature=temperature, seed=seed, grammar=grammar), seed=seed)
    assert ended
    answer = json.loads(TOKENIZER.decode(tokens))
    assert set(answer) <= {"name", "age", "tags"}
    assert isinstance(answer["name"], str)
    assert len(answer["name"]) <= 5
    assert isinstance(answer["age"], int)
    assert 0 <= answer["age"] <= 130
    assert set(answer.get("tags", [])) <= {"a", "b"}


def test_an_object_is_an_object() -> None:
    grammar = GRAMMARS.json_object()
    assert allowed(grammar, '{"a": [1, true, {"b": null}],\n  "c": "x"}') == ENDS
    assert allowed(grammar, "[1]") is None
    assert allowed(grammar, '"a"') is None
    assert allowed(grammar, ' {"a"') is None


def test_the_end_may_come_exactly_where_the_grammar_may_end() -> None:
    number = GRAMMARS.json_schema({"type": "integer"})
    assert not ENDS & (allowed(number, "-") or set())
    after = allowed(number, "12") or set()
    assert after > ENDS  # more digits could come
    assert max(after) < len(TOKENIZER)
    assert allowed(GRAMMARS.json_schema({"const": "a"}), '"a"') == ENDS


def test_white_space_does_not_go_on_for_ever() -> None:
    grammar = GRAMMARS.json_schema({"const": {"a": 1}})
    for favourite in ("Ġ", "Ċ", "ĠĊ", "ĉ"):
        tokens, ended = write(Sampling(temperature=0.0, grammar=grammar), seed=0, favourite=favourite)
        assert ended
        assert json.loads(TOKENIZER.decode(tokens)) == {"a": 1}


def test_a_finished_answer_is_known_before_its_end_token() -> None:
    sampler = Sampler(Sampling(grammar=GRAMMARS.json_schema({"const": 1})), vocabulary=VOCABULARY)
    assert not sampler.finished
    sampler.accept(TOKENIZER.convert_tokens_to_ids("1"))
    assert sampler.finished


def test_answers_of_one_grammar_are_independent() -> None:
    grammar = GRAMMARS.json_schema({"type": "integer"})
    one, two = grammar.matcher(), grammar.matcher()
    bits, others = np.zeros((2, -(-VOCABULARY // 32)), dtype=np.int32)
    one.fill(bits)
    two.accept(TOKENIZER.convert_tokens_to_ids("1"))
    one.fill(others)
    assert (bits == others).all()


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"type": "objekt"}, "at #", "Invalid type: objekt"),
    ({"type": "object", "properties": {"a": {"items": {"type": "strin"}}}}, "at #/properties/a/items", "strin"),
    ({"properties": {"a": {"type": "array", "uniqueItems": True}}}, "at #/properties/a", "uniqueItems"),
    ({"$defs": {"n": {"not": {"type": "null"}}}, "items": {"$ref": "#/$defs/n"}}, "at #/$defs/n", "not"),
    ({"anyOf": [{"type": "null"}, {"format": "colour", "type": "string"}]}, "at #/anyOf/1", "colour"),
    ({"$ref": "#/$defs/nothing"}, "at #", "does not exist"),
    ({"$ref": "https://example.com/schema.json"}, "at #", "example.com"),
    ({"$ref": "#"}, "at #", "no JSON is described"),
    ({"type": "string", "pattern": "(?=a)b"}, "at #", "look-around"),
    ({"type": "string", "pattern": "("}, "at #", "unclosed group"),
    ({"type": "integer", "minimum": 5, "maximum": 3}, "at #", "minimum (5) is greater"),
    ({"x-guidance": {"lenient": True}, "type": "string", "format": "colour"}, "at #", "colour"),
    ({"description": "a" * MAX_SCHEMA_BYTES}, "bytes", "make it smaller"),
    ({"const": float("nan")}, "no JSON", "Send a JSON object"),
]


@pytest.mark.parametrize(("schema", "place", "problem"), REFUSED)
def test_schemas_that_cannot_be_used_are_refused_by_name_and_place(
    schema: dict[str, Any], place: str, problem: str
) -> None:
    with pytest.raises(SchemaError) as caught:
        GRAMMARS.json_schema(schema)
    assert f"{place}" in caught.value.message
    assert problem in caught.value.message
    assert caught.value.param == "response_format"


@pytest.mark.parametrize("depth", [200, 5_000])
def test_a_schema_that_is_nested_too_deeply_is_refused(depth: int) -> None:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    with pytest.raises(SchemaError):
        GRAMMARS.json_schema(schema)


@settings(deadline=None, max_examples=60)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "type",
                        "properties",
                        "items",
                        "anyOf",
                        "oneOf",
                        "allOf",
                        "$ref",
                        "$defs",
                        "enum",
                        "const",
                        "required",
                    ]
                )
                | st.text(max_size=3),
                inner,
                max_size=3,
            )
        ),
        max_leaves=10,
    ).filter(lambda value: isinstance(value, dict))
)
def test_nothing_that_is_sent_as_a_schema_does_more_than_be_refused(schema: dict[str, Any]) -> None:
    try:
        matcher = GRAMMARS.json_schema(schema).matcher()
    except SchemaError:
        return
    matcher.fill(np.zeros(-(-VOCABULARY // 32), dtype=np.int32))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": False},
        {"type": "array", "prefixItems": [{"type": "integer"}], "minItems": 1, "maxItems": 3},
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1.5},
        {"type": "integer", "multipleOf": 5},
        {"type": "string", "format": "date-time"},
        {"type": "string", "pattern": "^[a-z]{2,3}$", "minLength": 2},
        {"allOf": [{"type": "integer"}, {"minimum": 3}]},
        {"type": ["string", "null"]},
        {"oneOf": [{"type": "string"}, {"type": "integer"}]},
        {"$defs": {"n": {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"},
    ],
)
def test_what_is_named_as_supported_is(schema: dict[str, Any]) -> None:
    assert isinstance(GRAMMARS.json_schema(schema), Grammar)


def test_compiled_grammars_are_kept() -> None:
    assert GRAMMARS.json_object() is GRAMMARS.json_object()
    assert GRAMMARS.json_schema(PERSON) is GRAMMARS.json_schema(dict(PERSON))
