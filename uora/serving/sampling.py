"""The choice of the next token, for all rows of a batch at once.

What a row gets depends on its own logits and options alone, whatever else is in the batch.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from uora.errors import GenerationError, SamplingError
from uora.serving.grammar import Grammar

#: Likeliest tokens that can be asked for with each token, as in the OpenAI API.
MAX_TOP_LOGPROBS = 20
#: Temperatures below are 0: the likeliest token.
_SMALLEST_TEMPERATURE = 1e-5
# Nuclei are looked for among this many of the likeliest tokens, and in the whole vocabulary where that is not enough.
_USUAL_NUCLEUS = 256
# In place of a token: there is none, or its nucleus is wider than the usual one.
_NONE, _WIDE = -1, -2


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


@dataclass(frozen=True)
class Sampled:
    """A chosen token.

    Attributes:
        token: its id.
        logprob: natural logarithm of its probability by the model itself, before bias, penalties, temperature and
            grammar; None if not wanted.
        top: the likeliest tokens and their log probabilities, most likely first.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """The choices of one answer: its random numbers, what it has generated, and how far its grammar has got.

    Penalties count the tokens that were generated, not those of the prompt.

    Args:
        sampling: how tokens are chosen.
        vocabulary: width of the model's logits.

    Raises:
        SamplingError: an option cannot be used.
    """

    def __init__(self, sampling: Sampling, *, vocabulary: int) -> None:
        _check(sampling, vocabulary)
        self.sampling = sampling
        self.matcher = sampling.grammar.matcher() if sampling.grammar else None
        seed = None if sampling.seed is None else sampling.seed % 2**64
        self._random = np.random.Generator(np.random.Philox(seed))
        self._counts: Counter[int] = Counter()
        self._places: dict[int, int] = {}  # of each token in the two that follow
        self.adjusted = array("q")  # tokens whose logits get something added
        self.adjustments = array("f")  # what they get
        for token, bias in sampling.logit_bias.items():
            self._adjust(token, bias)

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn; otherwise the likeliest is taken."""
        return self.sampling.temperature >= _SMALLEST_TEMPERATURE

    @property
    def finished(self) -> bool:
        """Whether the answer is complete by its grammar: nothing but an end token would follow."""
        return self.matcher is not None and self.matcher.finished

    def uniform(self) -> float:
        """The next random number of the answer, in [0, 1) and exact in float32."""
        return float(self._random.random(dtype=np.float32))

    def accept(self, token: int) -> None:
        """Go on by the token that was chosen.

        Raises:
            GenerationError: the grammar does not allow it.
        """
        sampling = self.sampling
        if sampling.presence_penalty or sampling.frequency_penalty:
            self._counts[token] += 1
            penalty = sampling.presence_penalty + sampling.frequency_penalty * self._counts[token]
            self._adjust(token, sampling.logit_bias.get(token, 0.0) - penalty)
        if self.matcher is not None:
            self.matcher.accept(token)

    def _adjust(self, token: int, value: float) -> None:
        place = self._places.setdefault(token, len(self.adjusted))
        if place == len(self.adjusted):
            self.adjusted.append(token)
            self.adjustments.append(value)
        else:
            self.adjustments[place] = value


def _check(sampling: Sampling, vocabulary: int) -> None:
    outside = [token for token in sampling.logit_bias if not 0 <= token < vocabulary]
    if outside:
        raise SamplingError(
            f"logit_bias names token {outside[0]}, the model's tokens are 0 to {vocabulary - 1}; take this one out.",
            param="logit_bias",
        )
    if not 0 <= (sampling.top_logprobs or 0) <= MAX_TOP_LOGPROBS:
        raise SamplingError(
            f"top_logprobs is {sampling.top_logprobs}; ask for 0 to {MAX_TOP_LOGPROBS}.", param="top_logprobs"
        )


@torch.inference_mode()
def sample(logits: Tensor, samplers: Sequence[Sampler]) -> list[Sampled | Exception]:
    """Choose the next token of every row, and let its sampler go on by it.

    Rows that take the likeliest token and want nothing else cost no more than their share of one maximum.

    Args:
        logits: ``(rows, vocabulary)``, floats of any type on any device.
        samplers: one a row.

    Returns:
        For every row its token, or what is wrong with this row alone: logits that are not finite, or a grammar that
        allows no token.
    """
    best, likeliest = logits.max(-1)
    tokens = torch.where(best.isfinite(), likeliest, _NONE)
    results: dict[int, Sampled | Exception] = {}
    shaped = [row for row, s in enumerate(samplers) if s.draws or s.adjusted or s.matcher]
    if shaped:
        chosen = _Shaped(logits[shaped].float(), [samplers[row] for row in shaped])
        tokens[shaped] = torch.where(tokens[shaped] == _NONE, _NONE, chosen.tokens)
        results = {shaped[place]: error for place, error in chosen.failures.items()}
    found: list[int] = tokens.tolist()
    wide = [place for place, row in enumerate(shaped) if found[row] == _WIDE]
    if wide:
        for place, token in zip(wide, chosen.draw_wide(wide).tolist(), strict=True):
            found[shaped[place]] = token
    for row, token in enumerate(found):
        if row not in results:
            results[row] = _accept(samplers[row], token)
    _add_logprobs(results, logits, samplers)
    return [results[row] for row in range(len(samplers))]


class _Shaped:
    """The rows whose distribution is changed or drawn from.

    Attributes:
        tokens: ``(rows)``, the chosen ones, or `_NONE` or `_WIDE`.
        failures: what is wrong with rows, by their place among these.
    """

    def __init__(self, weights: Tensor, samplers: Sequence[Sampler]) -> None:
        self._weights = weights  # (rows, vocabulary) of float32, a copy that is changed in place
        self._samplers = samplers
        self.failures: dict[int, Exception] = {}
        self._add_adjustments()
        self._apply_grammars()
        self._best, likeliest = weights.max(-1, keepdim=True)
        self.tokens = likeliest[:, 0]
        self._draw()
        self.tokens = torch.where(self._best[:, 0].isfinite(), self.tokens, _NONE)

    def _add_adjustments(self) -> None:
        """Add bias and penalties, for all rows at once."""
        counts = [len(s.adjusted) for s in self._samplers]
        if any(counts):
            rows = np.repeat(np.arange(len(counts)), counts)
            tokens = np.concatenate([np.array(s.adjusted) for s in self._samplers])
            values = np.concatenate([np.array(s.adjustments) for s in self._samplers])
            self._weights.index_put_((self._tensor(rows), self._tensor(tokens)), self._tensor(values), accumulate=True)

    def _apply_grammars(self) -> None:
        """Set the logits of tokens that a row's grammar does not allow to minus infinity."""
        matchers = {place: s.matcher for place, s in enumerate(self._samplers) if s.matcher}
        if not matchers:
            return
        vocabulary = self._weights.shape[1]
        words = np.zeros((len(matchers), -(-vocabulary // 32)), dtype=np.int32)
        for bits, (place, matcher) in zip(words, matchers.items(), strict=True):
            try:
                matcher.fill(bits)
            except Exception as error:  # one row's failure is its own
                self.failures[place] = error
        packed = self._tensor(words.view(np.uint8))
        shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
        allowed = (packed[:, :, None] >> shifts & 1).flatten(1)[:, :vocabulary].bool()
        rows = list(matchers)
        self._weights[rows] = self._weights[rows].masked_fill(~allowed, -torch.inf)

    def _draw(self) -> None:
        drawn = [place for place, s in enumerate(self._samplers) if s.draws]
        self._numbers = {place: self._samplers[place].uniform() for place in drawn}
        whole = [place for place in drawn if self._samplers[place].sampling.top_p >= 1.0]
        nuclei = [place for place in drawn if self._samplers[place].sampling.top_p < 1.0]
        if whole:
            cumulated = self._probabilities(whole).cumsum(-1)
            self.tokens[whole] = self._invert(cumulated, cumulated[:, -1:], whole)
        if nuclei:
            size = min(_USUAL_NUCLEUS, self._weights.shape[1])
            self.tokens[nuclei] = self._draw_nucleus(nuclei, *self._probabilities(nuclei).topk(size))

    def draw_wide(self, places: list[int]) -> Tensor:
        """Tokens of these rows, `_WIDE` before: ``(places)``."""
        return self._draw_nucleus(places, *self._probabilities(places).sort(descending=True, stable=True))

    def _draw_nucleus(self, places: list[int], probabilities: Tensor, order: Tensor) -> Tensor:
        """Draw from the smallest set of the likeliest tokens that reaches ``top_p``, or `_WIDE` if it is larger.

        Args:
            places: of the rows.
            probabilities: ``(places, likeliest)``, descending.
            order: ``(places, likeliest)``, their tokens.
        """
        top_p = self._column([self._samplers[place].sampling.top_p for place in places])
        cumulated = probabilities.cumsum(-1)
        inside = cumulated - probabilities < top_p  # the likeliest token always
        total = cumulated.masked_fill(~inside, 0.0).amax(-1, keepdim=True)
        tokens = order.gather(-1, self._invert(cumulated, total, places)[:, None])[:, 0]
        if order.shape[1] == self._weights.shape[1]:
            return tokens
        return torch.where(cumulated[:, -1] >= top_p[:, 0], tokens, _WIDE)

    def _probabilities(self, places: list[int]) -> Tensor:
        temperatures = self._column([self._samplers[place].sampling.temperature for place in places])
        return ((self._weights[places] - self._best[places]) / temperatures).softmax(-1)

    def _invert(self, cumulated: Tensor, total: Tensor, places: list[int]) -> Tensor:
        """Where each row's random number, as a share of ``total (places, 1)``, falls in ``cumulated``: ``(places)``."""
        share = self._column([self._numbers[place] for place in places]) * total
        share = torch.minimum(share, total.nextafter(torch.zeros_like(total)))  # rounding could make it all of it
        found = torch.searchsorted(cumulated, share, right=True)[:, 0]
        return found.clamp(max=cumulated.shape[1] - 1)  # of rows that are not finite, whose token is not used

    def _column(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._weights.device)[:, None]

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._weights.device)


def _accept(sampler: Sampler, token: int) -> Sampled | Exception:
    if token == _NONE:
        return GenerationError(
            "The model's logits are not finite (NaN or infinity) for the tokens that may come here. Its weights or the "
            "adapter are damaged, or logit_bias is too large."
        )
    try:
        sampler.accept(token)
    except Exception as error:  # one row's failure is its own
        return error
    return Sampled(token)


def _add_logprobs(results: dict[int, Sampled | Exception], logits: Tensor, samplers: Sequence[Sampler]) -> None:
    """Give the rows that want them the log probabilities of the model's own distribution."""
    wanted = {
        row: (result.token, samplers[row].sampling.top_logprobs)
        for row, result in results.items()
        if isinstance(result, Sampled)
    }
    counts = {row: (token, count) for row, (token, count) in wanted.items() if count is not None}
    if not counts:
        return
    own = logits[list(counts)].float().log_softmax(-1)
    chosen = torch.tensor([[token] for token, _ in counts.values()], device=own.device)
    # Always as many, since the order of equally likely tokens may depend on how many are looked for.
    top = own.topk(min(MAX_TOP_LOGPROBS, own.shape[1]))
    rows = zip(
        counts.items(), own.gather(-1, chosen)[:, 0].tolist(), top.values.tolist(), top.indices.tolist(), strict=True
    )
    for (row, (token, count)), logprob, values, tokens in rows:
        results[row] = Sampled(token, logprob, tuple(zip(tokens, values, strict=True))[:count])
