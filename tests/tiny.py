"""Base models small enough for any test, built from configs: a Llama with a real tokenizer and chat template, a BERT
with a tokenizer of letters, a ViT with an image processor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

#: ChatML without a default system message.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Written in the byte-level alphabet: Ġ is a space, Ċ a newline. The whitespace merges matter: they are what makes
# tokenizing a prompt and its answer together differ from tokenizing them one after the other.
_MERGES = [
    ("Ċ", "Ċ"),
    ("Ġ", "Ġ"),
    ("ĠĠ", "ĠĠ"),
    ("Ċ", "ĠĠ"),
    ("t", "h"),
    ("th", "e"),
    ("Ġ", "the"),
    ("e", "r"),
    ("i", "n"),
]


def make_tiny_llama(directory: Path, *, chat_template: str = CHATML, max_tokens: int = 1024) -> Path:
    """Write a transformers directory with random weights; the same bytes on every call.

    Args:
        directory: made if it is not there.
        chat_template: of the tokenizer.
        max_tokens: the model's context.

    Returns:
        ``directory``.
    """
    tokenizer = make_tiny_tokenizer(chat_template=chat_template)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_tokens,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|im_start|>"),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    _save(directory, lambda: LlamaForCausalLM(config), tokenizer)
    return directory


def make_tiny_bert(directory: Path, *, with_pooler: bool = True, dropout: float = 0.1) -> Path:
    """Write an encoder without a head, as all-MiniLM-L6-v2 is one; see `make_tiny_llama`.

    Args:
        directory: made if it is not there.
        with_pooler: whether its files hold the pooler that a classifier stands on.
        dropout: of hidden states and attention, in training.
    """
    tokenizer = make_letter_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=tokenizer.pad_token_id,
    )
    _save(directory, lambda: BertModel(config, add_pooling_layer=with_pooler), tokenizer)
    return directory


def make_tiny_vit(directory: Path) -> Path:
    """Write an encoder of 16 x 16 images without a head; see `make_tiny_llama`."""
    config = ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
    )
    _save(
        directory,
        lambda: ViTModel(config, add_pooling_layer=False),
        ViTImageProcessorPil(size={"height": 16, "width": 16}),
    )
    return directory


def _save(
    directory: Path, build: Callable[[], PreTrainedModel], inputs: PreTrainedTokenizerFast | ViTImageProcessorPil
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    inputs.save_pretrained(directory)


def make_letter_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece over single letters, with BERT's special tokens and segments."""
    letters = "abcdefghijklmnopqrstuvwxyz.,!?"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *("##" + letter for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    )


def make_tiny_tokenizer(*, chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a handful of merges: any text round-trips."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*_SPECIAL, *alphabet, *(left + right for left, right in _MERGES)]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=_MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def make_tiny_causal(directory: Path, model_type: str, *, chat_template: str | None = CHATML, **changes: Any) -> Path:
    """Write a causal model of any of transformers' types with random weights; see `make_tiny_llama`.

    Args:
        directory: made if it is not there.
        model_type: transformers' name of its kind.
        chat_template: of the tokenizer; None for one without.
        changes: to its configuration.
    """
    tokenizer = make_tiny_tokenizer(chat_template=chat_template)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = AutoConfig.for_model(model_type, **sizes | changes)
    _save(directory, lambda: AutoModelForCausalLM.from_config(config), tokenizer)
    return directory
