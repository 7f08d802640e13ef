"""Whether the running batch computes what the model computes: tried before anything is served.

The batch has attention and layers of its own. A model with something in its attention that these do not have (caps,
sinks, biases of distance, tokens that mix elsewhere) fails in them, or worse, does not fail and answers wrongly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from uora.comparing import KERNEL_TOLERANCES, relative_difference, tokens_to_try
from uora.errors import SpecError
from uora.serving.generation import Batcher

#: Tokens of the longer prompt; another is shorter, so that mixed up rows and positions show.
_PROMPT = 29
#: Tokens that are decoded after each.
_DECODED = 2
#: Tokens of a prompt that are read at first; the rest is a second piece.
_PIECE = 11
_SERVED = (
    "The engine serves causal language models whose attention is a plain softmax over the whole context, with rotary "
    "or learned positions (such as Llama, Qwen2, Qwen3, Phi, GPT-2, GPT-NeoX, Mistral without a sliding window). "
    "Choose such a base model (UORA_BASE_MODELS, UORA_ENGINE_BASE_MODEL)."
)


@dataclass(frozen=True)
class Tryout:
    """Rows of tokens and what the model says to the last of each, as it was loaded.

    Attributes:
        model_type: transformers' name of the model's kind.
        tolerance: `relative_difference` that its precision explains.
        rows: prompts with the tokens that are decoded after them.
        expected: logits of each, ``(1 + decoded, vocabulary)``.
    """

    model_type: str
    tolerance: float
    rows: list[list[int]]
    expected: list[Tensor]

    @classmethod
    def of(cls, model: PreTrainedModel, *, context: int) -> Tryout:
        """Run the model by itself; before `AdapterBank` and `Batcher`, which change its layers in place.

        Args:
            model: as it was loaded.
            context: tokens that a row may have, at least 3.
        """
        longer = min(_PROMPT + _DECODED, context)
        ids = tokens_to_try(model.config.get_text_config().vocab_size, 2 * longer)
        shorter = max(2 * longer // 3, 1 + _DECODED)
        rows = [ids[:longer], ids[longer : longer + shorter]]
        with torch.inference_mode():
            expected = [
                model(input_ids=torch.tensor([row], device=model.device), use_cache=False).logits[0, -1 - _DECODED :]
                for row in rows
            ]
        return cls(model.config.model_type, KERNEL_TOLERANCES[model.dtype], rows, expected)

    def check(self, build: Callable[[], Batcher]) -> Batcher:
        """Build the batch and run the rows in it.

        Returns:
            the batch, with nothing in it.

        Raises:
            SpecError: the batch cannot be built or run, or says something else than the model by itself.
        """
        try:
            batcher = build()
            difference = self.difference(batcher)
        except (MemoryError, torch.OutOfMemoryError):
            raise  # says nothing of the model's kind
        except Exception as error:  # whatever a model raises that is not made for this
            raise SpecError(
                f"The base model is of the type {self.model_type!r}, whose layers cannot run in the engine's batch: "
                f"{type(error).__name__}: {error}. {_SERVED}",
                code="base_model_not_servable",
                param="base_model",
            ) from error
        if not difference <= self.tolerance:  # NaN is no agreement
            raise SpecError(
                f"The base model is of the type {self.model_type!r}, for which the engine's batch computes other "
                f"logits than the model by itself: found a relative difference of {difference:.3g}, expected at most "
                f"{self.tolerance:g}. {_SERVED}",
                code="base_model_not_servable",
                param="base_model",
            )
        return batcher

    def difference(self, batcher: Batcher) -> float:
        """`relative_difference` between the rows in the batch and by themselves."""
        found = batcher.rehearse(self.rows, decoded=_DECODED, piece=_PIECE)
        return relative_difference(found, self.expected)
