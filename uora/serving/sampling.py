"""The choice of the next token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from uora.serving.grammar import Grammar


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are chosen.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: probability of the nucleus that is drawn from (Holtzman et al., 2020).
        seed: of the answer's random numbers; None draws one from the operating system.
        stop: strings that end the answer, which ends before them.
        presence_penalty: subtracted from the logit of each token that was generated before.
        frequency_penalty: subtracted from a token's logit as often as it was generated before.
        logit_bias: added to logits, by token id.
        top_logprobs: how many of the likeliest come with each token; None for no log probabilities.
        grammar: what the answer has to match.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None
    grammar: Grammar | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """A token of an answer and its log probability.

    Attributes:
        token: text of the token alone; bytes that are no character become U+FFFD.
        bytes: its bytes, 0 to 255.
        logprob: natural logarithm of its probability by the model.
        top: the likeliest tokens at its place, most likely first; their own ``top`` is empty.
    """

    token: str
    bytes: tuple[int, ...]
    logprob: float
    top: tuple[TokenLogprob, ...] = ()
