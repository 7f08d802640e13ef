"""Streamed text: whole characters, nothing of a stop string, and the log probabilities that belong to it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tests.tiny import make_tiny_tokenizer
from uora.serving.sampling import Sampled
from uora.serving.text import Piece, StopScanner, TextStream, TokenBytes

TOKENIZER = make_tiny_tokenizer()
TOKENS = TokenBytes(TOKENIZER)
BYTE = {TOKENS.name(token): token for token in range(len(TOKENIZER)) if len(TOKENS.name(token)) == 1}

letters = st.text("ab<", max_size=12)
stops = st.lists(st.text("ab<", min_size=1, max_size=4), max_size=3)


def before_first_stop(text: str, stop: list[str]) -> str:
    """The definition: look after each character whether a stop string is complete, and take the longest."""
    for end in range(1, len(text) + 1):
        found = [len(string) for string in stop if text[:end].endswith(string)]
        if found:
            return text[: end - max(found)]
    return text


def stream(ids: list[int], stop: list[str] | None = None, *, logprobs: bool = False) -> tuple[list[Piece], bool]:
    """All pieces of an answer, and whether a stop string ended it."""
    text = TextStream(TOKENS, stop or [])
    pieces = []
    for number, token in enumerate(ids):
        pieces.append(text.feed(Sampled(token, -float(number) if logprobs else None)))
        if text.stopped:
            break
    pieces.append(text.flush())
    return pieces, text.stopped


def joined(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


@given(pieces=st.lists(letters, max_size=6), stop=stops)
def test_scanner_cuts_at_the_first_stop_string_wherever_pieces_end(pieces: list[str], stop: list[str]) -> None:
    whole, sent = "".join(pieces), ""
    expected = before_first_stop(whole, stop)
    scanner = StopScanner(stop)
    for piece in pieces:
        sent += scanner.feed(piece)
        assert expected.startswith(sent)
    sent += scanner.flush()
    assert sent == expected
    assert scanner.stopped == any(string in whole for string in stop)


@given(st.text("ab", max_size=30), st.text("ab", min_size=1, max_size=6))
def test_no_more_is_held_back_than_could_begin_the_stop_string(text: str, stop: str) -> None:
    scanner = StopScanner([stop])
    sent = "".join(scanner.feed(character) for character in text)
    if not scanner.stopped:
        held = max((n for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
        assert len(sent) == len(text) - held


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_pieces_are_the_text_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    for ids in (TOKENIZER.encode(text, add_special_tokens=False), [BYTE[bytes([b])] for b in text.encode()]):
        pieces, stopped = stream(ids, stop)
        assert joined(pieces) == before_first_stop(text, stop)
        assert stopped == any(string in text for string in stop)


@given(st.binary(max_size=12))
def test_bytes_that_are_no_character_become_replacements(content: bytes) -> None:
    ids = [BYTE[bytes([b])] for b in content]
    pieces, _ = stream(ids)
    assert joined(pieces) == content.decode(errors="replace") == TOKENIZER.decode(ids)


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=12))
def test_any_tokens_give_what_decoding_at_once_gives(ids: list[int]) -> None:
    pieces, _ = stream(ids)
    assert joined(pieces) == TOKENIZER.decode(ids, skip_special_tokens=True)


@given(st.text(max_size=20), stops)
def test_log_probabilities_are_of_the_tokens_that_begin_in_the_text(text: str, stop: list[str]) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    pieces, stopped = stream(ids, stop, logprobs=True)
    sent, begun = 0, 0
    for piece in pieces[:-1]:
        sent += len(piece.text)
        begun += len(piece.logprobs)
        assert all(found.bytes for found in piece.logprobs)
        assert bool(piece.text) or not piece.logprobs
    found = [logprob for piece in pieces for logprob in piece.logprobs]
    assert [logprob.logprob for logprob in found] == [-float(n) for n in range(len(found))]
    whole = b"".join(bytes(logprob.bytes) for logprob in found)
    kept = joined(pieces).encode()
    if not stopped:
        assert whole == text.encode()
    else:  # the last token may reach into the stop string, but begins before it
        assert whole.startswith(kept)
        assert sum(len(logprob.bytes) for logprob in found[:-1]) < max(len(kept), 1)


def test_a_token_has_its_real_bytes() -> None:
    ids = TOKENIZER.encode("é", add_special_tokens=False)
    pieces, _ = stream(ids, logprobs=True)
    first, second = (logprob for piece in pieces for logprob in piece.logprobs)
    assert (first.token, first.bytes, second.bytes) == ("\ufffd", (0xC3,), (0xA9,))


def test_special_tokens_have_a_name_and_no_text() -> None:
    end = TOKENIZER.eos_token_id
    assert TOKENS.text(end) == b""
    assert TOKENS.name(end).decode() == TOKENIZER.eos_token
    assert TOKENS.name(len(TOKENIZER) + 5) == b""


def test_a_sentencepiece_tokenizer_drops_the_first_space_only() -> None:
    vocabulary = {"<unk>": 0, "<0xC3>": 1, "<0xA9>": 2, "▁a": 3, "b": 4}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    text = TextStream(TokenBytes(tokenizer))
    ids = [3, 4, 3, 1, 2]
    assert "".join(text.feed(Sampled(token)).text for token in ids) == "ab aé" == tokenizer.decode(ids)


@pytest.mark.parametrize("stop", [["zz"], []])
def test_what_is_held_back_comes_out_at_the_end(stop: list[str]) -> None:
    pieces, _ = stream([*TOKENIZER.encode("az", add_special_tokens=False), BYTE[b"\xc3"]], stop)
    assert joined(pieces) == "az\ufffd"
