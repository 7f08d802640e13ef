"""Small models built from configurations, for tests of the tuner and of serving."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTModel,
)

from uora.artifact import Artifact, Provenance, loads
from uora.methods import adapted_layers, attach, export_artifact, load_artifact
from uora.spec import AdapterSpec, parse_adapter
from uora.svd import BaseWeights
from uora.tuner import UoraConfig

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


def vit(seed: int = 0) -> nn.Module:
    """A vision encoder."""
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=8, patch_size=4
    )
    return ViTModel(config, add_pooling_layer=False).eval()


def mlp(seed: int = 0) -> nn.Module:
    """Linear layers of no particular model."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 5)).eval()


@dataclass(frozen=True)
class Toy:
    """A model to put any method on, with what goes in: ``inputs(rows)``."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    targets: str | tuple[str, ...] = "all-linear"


def _ids(rows: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, 7), generator=torch.Generator().manual_seed(0))


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


ALL_TOYS = {
    "mlp": Toy(mlp, lambda rows: _normal(rows, 6)),
    "llama": Toy(llama, _ids),
    "bert": Toy(bert, _ids, targets="q,v"),
    "vit": Toy(vit, lambda rows: _normal(rows, 3, 8, 8)),
    "gpt2": Toy(gpt2, _ids, targets=("c_attn", "c_fc")),
}
#: Models of tokens, with targets as PEFT takes them.
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
    return found if isinstance(found, Tensor) else found[0]


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


def store(model: PeftModel, provenance: Provenance = PROVENANCE) -> bytes:
    """A UORA adapter in its stored form."""
    names = tuple(sorted({name.rpartition(".")[2] for name in adapted_layers(model)}))
    return export(model, model.peft_config["default"].spec(targets=names), provenance)


def export(model: PeftModel, spec: AdapterSpec, provenance: Provenance = PROVENANCE) -> bytes:
    """An adapter in its stored form."""
    return export_artifact(model, spec, base=BaseWeights.of_model(model), provenance=provenance)


def artifact(seed: int = 1, **config: object) -> Artifact:
    """A trained-looking UORA adapter in its stored form; ``hit=True`` gives it hits."""
    hit = config.pop("hit", False)
    model = adapted("llama", **config)
    randomise(model, seed=seed)
    if hit:
        model.base_model.uora_hits["default"].copy_(torch.arange(model.peft_config["default"].r) % 3)
    return loads(store(model))


def artifact_of(method: str, seed: int = 1, **settings: object) -> Artifact:
    """A stored adapter of any method whose numbers have moved away from their start."""
    spec = parse_adapter({"method": method, "r": 4, **settings})
    model = attach(llama(), spec, base=BaseWeights.of_model(llama()), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return loads(export(model, spec))


def load(item: Artifact, build: Callable[[], nn.Module] = llama) -> nn.Module:
    """A toy with a stored adapter on it."""
    base = build()
    return load_artifact(base, item, base=BaseWeights.of_model(base)).eval()
