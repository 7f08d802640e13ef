"""Small models built from configurations, for tests of the tuner and of serving."""

from __future__ import annotations

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from uora.artifact import Artifact, Provenance, loads
from uora.tuner import UoraConfig, export_artifact

VOCABULARY = 64
PROVENANCE = Provenance(base_model="toy", base_digest="0" * 64, chat_template_sha256="1" * 64, data_sha256="2" * 64)


def llama(seed: int = 0) -> nn.Module:
    """Grouped-query attention: layer sides of 16, 32 and 48."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=128,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2(seed: int = 0) -> nn.Module:
    """Conv1D layers, whose weights are (in, out)."""
    torch.manual_seed(seed)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64)
    return GPT2LMHeadModel(config).eval()


def bert(seed: int = 0) -> nn.Module:
    """An encoder."""
    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=VOCABULARY,
    )
    return BertModel(config).eval()


TOYS = {
    "llama": (llama, "all-linear"),
    "llama-qv": (llama, ["q_proj", "v_proj"]),
    "gpt2": (gpt2, ["c_attn", "c_fc"]),
    "bert": (bert, ["query", "value"]),
}


def output(model: nn.Module, ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
    """The model's main output."""
    with torch.no_grad():
        found = model(ids, **kwargs)
    return found[0] if not hasattr(found, "logits") else found.logits  # type: ignore[no-any-return]


def randomise(model: nn.Module, adapter_name: str = "default", seed: int = 1, scale: float = 0.3) -> None:
    """Give an adapter vectors as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "uora_lambda" in name and name.endswith(f".{adapter_name}"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def adapted(toy: str = "llama", **config: object) -> PeftModel:
    """A toy with one trained-looking adapter."""
    build, targets = TOYS[toy]
    options = {"r": 8, "target_modules": targets} | config
    model = get_peft_model(build(), UoraConfig(**options))  # type: ignore[arg-type]
    randomise(model)
    return model.eval()


def artifact(seed: int = 1, **config: object) -> Artifact:
    """A trained-looking adapter in its stored form; ``hit=True`` gives it hits."""
    hit = config.pop("hit", False)
    model = adapted("llama", **config)
    randomise(model, seed=seed)
    if hit:
        model.base_model.uora_hits["default"].copy_(torch.arange(model.peft_config["default"].r) % 3)
    return loads(export_artifact(model, provenance=PROVENANCE))
