"""Streamed text: whole characters, and nothing of a stop string."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import make_tiny_tokenizer
from uora.serving.text import StopScanner, TextStream

letters = st.text("ab<", max_size=12)


@given(pieces=st.lists(letters, max_size=6), stop=st.lists(st.text("ab<", min_size=1, max_size=4), max_size=3))
def test_scanner_cuts_at_the_first_stop_string_wherever_pieces_end(pieces: list[str], stop: list[str]) -> None:
    whole = "".join(pieces)
    scanner = StopScanner(stop)
    sent = ""
    seen = ""
    for piece in pieces:
        seen += piece
        sent += scanner.feed(piece)
        assert whole.startswith(sent)
        if scanner.stopped:
            break
    else:
        sent += scanner.flush()
    # The first piece that completes a stop string ends the answer, at the earliest stop in what was seen.
    cuts = [seen.find(s) for s in stop if s in seen]
    assert scanner.stopped == bool(cuts)
    assert sent == (seen[: min(cuts)] if cuts else whole)


@given(st.text(min_size=1, max_size=30))
def test_characters_are_never_split(text: str) -> None:
    tokenizer = make_tiny_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer.backend_tokenizer, StopScanner())
    chunks = [stream.feed(token) for token in ids]
    assert all("\ufffd" not in chunk or "\ufffd" in text for chunk in chunks)
    assert "".join(chunks) + stream.flush() == tokenizer.decode(ids, skip_special_tokens=True)
