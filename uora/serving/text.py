"""From tokens to text that can be sent: no half characters, nothing of a stop string."""

from __future__ import annotations

import codecs
import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from transformers import PreTrainedTokenizerFast

from uora.serving.sampling import Sampled, TokenLogprob


@cache
def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (Radford et al., 2019).

    Printable bytes of Latin-1 are themselves; the others take the characters from U+0100 on, in their order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


class TokenBytes:
    """The bytes of each token of a tokenizer: byte-level BPE, or SentencePiece's with ``▁`` and ``<0x0A>``."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._added = {token: text.content.encode() for token, text in added.items()}
        self._special = frozenset(token for token, text in added.items() if text.special)
        decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
        parts = decoder.get("decoders", [decoder])
        self._byte_level = any(part.get("type") == "ByteLevel" for part in parts)
        self._known: dict[int, bytes] = {}

    def name(self, token: int) -> bytes:
        """Bytes of the token, special or not; none for an id that the tokenizer does not have."""
        if token not in self._known:
            self._known[token] = self._find(token)
        return self._known[token]

    def text(self, token: int, *, first: bool = False) -> bytes:
        """What the token adds to a text: nothing if it is special.

        Args:
            token: its id.
            first: whether it begins the text, where some tokenizers drop the space before a word.
        """
        if token in self._special:
            return b""
        found = self.name(token)
        if first and found.startswith(b" ") and not str(self._tokenizer.decode([token])).startswith(" "):
            return found[1:]
        return found

    def _find(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token]
        piece = self._tokenizer.backend_tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if self._byte_level:
            alphabet = _byte_alphabet()
            return bytes(alphabet[character] for character in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes.fromhex(piece[3:5])
        return piece.replace("▁", " ").encode()


class _Prefix:
    """How much of the beginning of ``string`` a text ends with, character by character (Knuth, Morris, Pratt, 1977)."""

    def __init__(self, string: str) -> None:
        self._string = string
        self._borders = [0, 0]  # of each beginning, the longest proper beginning that is its end too
        self.length = 0
        for character in string[1:]:
            self._borders.append(self._next(self._borders[-1], character))

    def feed(self, character: str) -> None:
        """Add a character to the text. Not to be called when the whole string has been found."""
        self.length = self._next(self.length, character)

    @property
    def complete(self) -> bool:
        """Whether the text ends with the whole string."""
        return self.length == len(self._string)

    def _next(self, length: int, character: str) -> int:
        while length and self._string[length] != character:
            length = self._borders[length]
        return length + (self._string[length] == character)


class StopScanner:
    """Holds back text that may turn out to be the beginning of a stop string.

    The text ends before the stop string that is complete first; of those that end at the same character, before the
    longest. So it does not matter in what pieces the text comes.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._prefixes = [_Prefix(string) for string in stop if string]
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """Text that is safe to send now. After a stop string, ``stopped`` is set and nothing follows."""
        if not self._prefixes:
            return text
        if self.stopped:
            return ""
        self._held += text
        for position, character in enumerate(text, start=len(self._held) - len(text) + 1):
            for prefix in self._prefixes:
                prefix.feed(character)
            found = max((prefix.length for prefix in self._prefixes if prefix.complete), default=0)
            if found:
                self.stopped = True
                return self._release(position - found, drop_rest=True)
        return self._release(len(self._held) - max(prefix.length for prefix in self._prefixes))

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        return self._release(len(self._held))

    def _release(self, count: int, *, drop_rest: bool = False) -> str:
        text, rest = self._held[:count], self._held[count:]
        self._held = "" if drop_rest else rest
        return text


@dataclass(frozen=True)
class Piece:
    """A part of an answer that can be sent: text, and the log probabilities of the tokens that begin in it."""

    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()


class TextStream:
    """The text of one answer as its tokens arrive, and their log probabilities where they have any.

    A token's log probability is sent with the first of its text. What a stop string cuts off takes the tokens with it
    that begin at or after the cut.
    """

    def __init__(self, tokens: TokenBytes, stop: Sequence[str] = ()) -> None:
        self._tokens = tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._scanner = StopScanner(stop)
        self._waiting: deque[tuple[int, TokenLogprob]] = deque()  # with the character at which each begins
        self._decoded = 0  # characters
        self._sent = 0
        self._first = True

    @property
    def stopped(self) -> bool:
        """Whether a stop string was reached; nothing follows it."""
        return self._scanner.stopped

    def feed(self, sampled: Sampled) -> Piece:
        """What can be sent after this token; often nothing, while a character is incomplete. Not for end tokens."""
        if sampled.logprob is not None and not self.stopped:
            self._waiting.append((self._decoded, self._logprob(sampled.token, sampled.logprob, sampled.top)))
        added = self._tokens.text(sampled.token, first=self._first)
        self._first = self._first and not added
        piece = self._send(self._scanner.feed(self._decode(added)))
        if self.stopped:
            self._waiting.clear()
        return piece

    def flush(self) -> Piece:
        """The rest at the answer's end. Bytes that are no character become U+FFFD."""
        if self.stopped:
            return Piece()
        text = self._scanner.feed(self._decode(b"", final=True))
        piece = self._send(text if self.stopped else text + self._scanner.flush())
        rest = () if self.stopped else tuple(logprob for _, logprob in self._waiting)
        self._waiting.clear()
        return Piece(piece.text, piece.logprobs + rest)

    def _decode(self, added: bytes, *, final: bool = False) -> str:
        text = self._decoder.decode(added, final)
        self._decoded += len(text)
        return text

    def _send(self, text: str) -> Piece:
        self._sent += len(text)
        begun = []
        while self._waiting and self._waiting[0][0] < self._sent:
            begun.append(self._waiting.popleft()[1])
        return Piece(text, tuple(begun))

    def _logprob(self, token: int, logprob: float, top: Sequence[tuple[int, float]] = ()) -> TokenLogprob:
        name = self._tokens.name(token)
        likeliest = tuple(self._logprob(*pair) for pair in top)
        return TokenLogprob(name.decode(errors="replace"), tuple(name), logprob, likeliest)
