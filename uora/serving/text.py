"""From tokens to text that can be sent: no half characters, nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


@dataclass
class StopScanner:
    """Holds back text that may turn out to be the beginning of a stop string."""

    stop: Sequence[str] = ()
    held: str = ""
    stopped: bool = False

    def feed(self, text: str) -> str:
        """Text that is safe to send now. After a stop string, ``stopped`` is set and nothing follows."""
        self.held += text
        found = [at for at in (self.held.find(stop) for stop in self.stop) if at >= 0]
        if found:
            self.stopped = True
            return self._release(min(found), drop_rest=True)
        return self._release(len(self.held) - self._possible_start())

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        return self._release(len(self.held))

    def _possible_start(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        return max(
            (n for stop in self.stop for n in range(1, len(stop)) if self.held.endswith(stop[:n])),
            default=0,
        )

    def _release(self, count: int, *, drop_rest: bool = False) -> str:
        text, rest = self.held[:count], self.held[count:]
        self.held = "" if drop_rest else rest
        return text


@dataclass
class TextStream:
    """The text of one answer as its tokens arrive."""

    tokenizer: Tokenizer
    scanner: StopScanner
    _decoder: DecodeStream = field(default_factory=lambda: DecodeStream(skip_special_tokens=True))

    def feed(self, token: int) -> str:
        """Text that can be sent after this token; often none, while a character is incomplete."""
        return self.scanner.feed(self._decoder.step(self.tokenizer, token) or "")

    @property
    def stopped(self) -> bool:
        """Whether a stop string was reached."""
        return self.scanner.stopped

    def flush(self) -> str:
        """The rest of the text at the end."""
        return self.scanner.flush()
