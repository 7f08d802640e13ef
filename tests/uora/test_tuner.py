"""UORA as a PEFT method: one list of behaviours over small models."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import RobertaConfig, RobertaModel

from tests.uora.toys import TOYS, VOCABULARY, adapted, gpt2, llama, load, mlp, output, randomise, store
from uora.artifact import loads
from uora.convert import write_lora
from uora.errors import FingerprintError, RankError, ShapeError, SpecError, UnsupportedLayerError
from uora.spec import FrameInit, UoraSpec
from uora.tuner import UoraConfig, reinitialise

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
IDS = torch.randint(0, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))
each_toy = pytest.mark.parametrize("toy", list(TOYS))
MLP_TARGETS: dict[str, Any] = {"target_modules": ["0", "2"]}
#: Every rule whose hits mean something else.
RULES: dict[str, dict[str, Any]] = {
    "shared": {},
    "dynamic": {"dynamic_alpha": True, "alpha": 0.9},
    "layer": {"reinit_scope": "layer"},
    "layer-dynamic": {"reinit_scope": "layer", "dynamic_alpha": True, "alpha": 0.9},
}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def hit(model: PeftModel, adapter_name: str = "default") -> None:
    """Hits of several depths on one adapter, as training would leave them."""
    hits = model.base_model.uora_hits[adapter_name]
    hits.copy_(torch.arange(hits.numel()).reshape(hits.shape) % 3)


def _run(model: nn.Module, x: torch.Tensor, **kwargs: object) -> torch.Tensor:
    """A plain module's output."""
    with torch.no_grad():
        found: torch.Tensor = model(x, **kwargs)
    return found


@each_toy
def test_starts_as_the_base_model(toy: str) -> None:
    build, targets = TOYS[toy]
    base = output(build(), IDS)
    torch.testing.assert_close(output(get_peft_model(build(), UoraConfig(r=8, target_modules=targets)), IDS), base)


@each_toy
@pytest.mark.parametrize("rule", [None, *RULES.values()], ids=["no hits", *RULES])
@pytest.mark.parametrize("r", [8, 40])  # 40 exceeds some of the sides
def test_forward_is_merge_is_lora_in_stock_peft(toy: str, rule: dict[str, Any] | None, r: int, tmp_path: Path) -> None:
    model = adapted(toy, r=r, **(rule or {}))
    if rule is not None:
        hit(model)
    expected = output(model, IDS)
    with model.disable_adapter():
        assert (output(model, IDS) - expected).abs().max() > 1e-3  # the adapter does something
    write_lora(loads(store(model)), tmp_path)
    lora = PeftModel.from_pretrained(TOYS[toy][0](), tmp_path).eval()
    torch.testing.assert_close(output(lora, IDS), expected, atol=1e-5, rtol=1e-5)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(output(model, IDS), expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(output(model, IDS), expected)
    unloaded = model.merge_and_unload()
    torch.testing.assert_close(output(unloaded, IDS), expected, atol=1e-5, rtol=1e-5)


@each_toy
@pytest.mark.parametrize("low_memory", [False, True])
@each_rule
def test_save_pretrained_round_trip_is_exact(toy: str, low_memory: bool, rule: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(toy, **rule)
    hit(model)
    model.save_pretrained(tmp_path)
    stored = (tmp_path / "adapter_model.safetensors").stat().st_size
    matrices = sum(p.numel() for n, p in model.named_parameters() if "uora_lambda" not in n)
    assert stored < matrices  # no frame was written
    loaded = PeftModel.from_pretrained(TOYS[toy][0](), tmp_path, low_cpu_mem_usage=low_memory).eval()
    assert torch.equal(output(loaded, IDS), output(model, IDS))


@each_toy
@each_rule
def test_artifact_round_trip_is_exact(toy: str, rule: dict[str, Any]) -> None:
    model = adapted(toy, **rule)
    hit(model)
    loaded = load(loads(store(model)), TOYS[toy][0])
    assert torch.equal(output(loaded, IDS), output(model, IDS))


@each_toy
def test_mixed_batch_is_row_by_row(toy: str) -> None:
    model = adapted(toy)
    hit(model)
    others = {"five": {"r": 5, "frame_seed": 9}, "kaiming": {"init": "kaiming", "r": 4}, **RULES}
    for seed, (name, config) in enumerate(others.items(), 5):
        model.add_adapter(name, UoraConfig(**{"r": 8, "target_modules": TOYS[toy][1]} | config))
        randomise(model, name, seed, scale=0.1)
        if name in RULES and name != "shared":
            hit(model, name)
    model.eval()
    names = ["five", "default", "__base__", *RULES, "five", "kaiming"]
    rows = [i % 3 for i in range(len(names))]
    mixed = output(model, IDS[rows], adapter_names=names)
    for row, (index, name) in enumerate(zip(rows, names, strict=True)):
        if name == "__base__":
            with model.disable_adapter():
                alone = output(model, IDS[index : index + 1])
        else:
            model.set_adapter(name)
            alone = output(model, IDS[index : index + 1])
        torch.testing.assert_close(mixed[row : row + 1], alone, atol=1e-5, rtol=1e-5)


def test_saved_modules_answer_row_by_row() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Sequential(nn.Linear(20, 5), nn.Tanh())).eval()
    model = get_peft_model(base, UoraConfig(r=4, target_modules="0", modules_to_save=["2"]))
    model.add_adapter("two", UoraConfig(r=4, target_modules="0", modules_to_save=["2"]))
    model.add_adapter("bare", UoraConfig(r=4, target_modules="0"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(4, 6)
    for active in ("two", "bare"):  # "bare" has no module of its own
        model.set_adapter(active)
        mixed = _run(model.eval(), x, adapter_names=["default", "__base__", "two", "bare"])
        for row, name in enumerate(["default", None, "two", "bare"]):
            with model.disable_adapter() if name is None else nullcontext():
                model.set_adapter(name or "default")
                torch.testing.assert_close(mixed[row : row + 1], _run(model, x[row : row + 1]))


def test_second_adapter_delete_and_deepcopy() -> None:
    model = adapted()
    expected = output(model, IDS)
    model.add_adapter("two", UoraConfig(r=4, target_modules=["q_proj"], frame_seed=1))
    assert torch.equal(output(model.eval(), IDS), expected)
    twin = copy.deepcopy(model)
    hit(twin)
    assert not torch.equal(output(twin, IDS), expected)
    assert torch.equal(output(model, IDS), expected)  # the copy's hits are its own
    model.delete_adapter("two")
    assert list(model.peft_config) == ["default"]
    assert not [key for key in model.state_dict() if key.endswith(".two")]


def test_training_moves_only_the_vectors() -> None:
    model = adapted().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "uora_lambda" in name}


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted().train()
        hit(model)
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model(IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_vectors_stay_float32_on_a_bfloat16_base() -> None:
    model = get_peft_model(llama().to(torch.bfloat16), UoraConfig(r=4, target_modules="all-linear"))
    assert {p.dtype for n, p in model.named_parameters() if "uora_lambda" in n} == {torch.float32}
    d = next(p for n, p in model.named_parameters() if "uora_lambda_d" in n)
    assert torch.equal(d, torch.full_like(d, 0.1))  # not rounded on the way
    assert output(model, IDS).dtype is torch.bfloat16


@each_rule
def test_reinitialise_hits_small_d_and_changes_the_frames(rule: dict[str, Any]) -> None:
    model = adapted(tau=0.05, **rule)
    layers = model.base_model.adapter_layers("default")
    below = sum(int((layer.uora_lambda_d["default"].abs() < 0.05).sum()) for layer in layers.values())
    before = output(model, IDS)
    d = [layer.uora_lambda_d["default"].clone() for layer in layers.values()]
    assert below > 0
    assert reinitialise(model, step=1) == below
    assert int(model.base_model.uora_hits["default"].sum()) == below
    assert not torch.equal(output(model, IDS), before)
    assert all(torch.equal(layer.uora_lambda_d["default"], old) for layer, old in zip(layers.values(), d, strict=True))


def test_quantile_hits_at_its_interval() -> None:
    model = adapted(tau_quantile=0.25, reinit_interval=3)
    layers = len(model.base_model.adapter_layers("default"))
    assert [reinitialise(model, step=step) for step in range(1, 7)] == [0, 0, 2 * layers, 0, 0, 2 * layers]


def test_a_hit_of_one_layer_leaves_the_others() -> None:
    model = adapted("llama-qv", reinit_scope="layer", tau=0.05)
    layers = list(model.base_model.adapter_layers("default").values())
    like = torch.empty(0)
    start = layers[0].frames["default"].get("A", 32, like=like)
    assert all(layer.frames["default"].get("A", 32, like=like) is start for layer in layers)  # no copy per layer
    with torch.no_grad():
        for layer in layers:
            layer.uora_lambda_d["default"].fill_(1.0)
        layers[2].uora_lambda_d["default"][5] = 0.0
    assert reinitialise(model, step=1) == 1
    for position, layer in enumerate(layers):
        found = layer.frames["default"].get("A", 32, like=like)
        assert (found is start) == (position != 2)
    changed = (layers[2].frames["default"].get("A", 32, like=like) != start).any(dim=1)
    assert changed.tolist() == [index == 5 for index in range(8)]


inits = st.sampled_from(get_args(FrameInit))


@st.composite
def adapted_mlps(draw: st.DrawFn) -> PeftModel:
    """A plain module of 6, 20 and 5 features with two adapters of any kind, which have hits."""
    model: Any = mlp().to(draw(st.sampled_from([torch.float32, torch.bfloat16])))
    for name in ("default", "two"):
        config = UoraConfig(
            r=draw(st.integers(1, 24)), frame_seed=draw(st.integers(0, 2)), init=draw(inits),
            **draw(st.sampled_from(list(RULES.values()))), **MLP_TARGETS,
        )  # fmt: skip
        if name == "default":
            model = get_peft_model(model, config)
        else:
            model.add_adapter(name, config)
        randomise(model, name, seed=draw(st.integers(0, 9)), scale=0.2)
        if draw(st.booleans()):
            hit(model, name)
    return model.eval()  # type: ignore[no-any-return]


def _rounding(dtype: torch.dtype) -> dict[str, float]:
    return {"atol": 1e-5, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 0.03, "rtol": 0.03}


@settings(deadline=None, max_examples=40)
@given(model=adapted_mlps(), safe=st.booleans())
def test_merging_and_unmerging_is_the_identity(model: PeftModel, safe: bool) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(4, 6, dtype=model.get_base_model()[0].weight.dtype)
    expected = _run(model, x)
    model.merge_adapter(["default"], safe_merge=safe)
    torch.testing.assert_close(_run(model, x), expected, **_rounding(x.dtype))
    model.merge_adapter(["two"], safe_merge=safe)
    model.unmerge_adapter()
    assert torch.equal(_run(model, x), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@settings(deadline=None, max_examples=40)
@given(model=adapted_mlps(), names=st.lists(st.sampled_from(["default", "two", "__base__"]), min_size=1, max_size=6))
def test_any_mixed_batch_is_row_by_row(model: PeftModel, names: list[str]) -> None:
    x = torch.randn(len(names), 6, dtype=model.get_base_model()[0].weight.dtype)
    mixed = _run(model, x, adapter_names=names)
    for row, name in enumerate(names):
        model.set_adapter("default" if name == "__base__" else name)
        with model.disable_adapter() if name == "__base__" else nullcontext():
            torch.testing.assert_close(mixed[row : row + 1], _run(model, x[row : row + 1]), **_rounding(x.dtype))


@settings(deadline=None, max_examples=20)
@given(rule=st.sampled_from(list(RULES.values())), seed=st.integers(0, 1000), steps=st.integers(1, 5))
def test_reinitialisation_is_a_pure_function_of_hits_and_seed(rule: dict[str, Any], seed: int, steps: int) -> None:
    def build() -> PeftModel:
        model = get_peft_model(mlp(), UoraConfig(**{"r": 7, "tau": 0.2, "frame_seed": seed} | rule | MLP_TARGETS))
        randomise(model)
        return model.eval()

    x, lived, model = torch.randn(3, 6), build(), build()
    for step in range(1, steps + 1):
        torch.manual_seed(step)
        randomise(lived, seed=seed + step)
        reinitialise(lived, step=step)
        _run(lived, x)  # what is derived from the hits on the way must leave no trace
    randomise(lived)
    model.base_model.uora_hits["default"].copy_(lived.base_model.uora_hits["default"])
    assert torch.equal(_run(model, x), _run(lived, x))


def _tied(family: str) -> nn.Module:
    """A model whose head and input embeddings are one parameter."""
    model = gpt2() if family == "gpt2" else llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    return model


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings:UserWarning")
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merging_into_a_tied_weight_leaves_the_other_module(family: str, tmp_path: Path) -> None:
    base = _tied(family)
    embeddings = base.get_input_embeddings().weight
    before = embeddings.detach().clone()
    model = get_peft_model(base, UoraConfig(r=8, target_modules=["lm_head"]))
    randomise(model)
    expected = output(model.eval(), IDS)
    model.merge_adapter()
    torch.testing.assert_close(output(model, IDS), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(embeddings, before)
    model.unmerge_adapter()
    assert base.lm_head.base_layer.weight is embeddings  # tied again
    merged = model.merge_and_unload()
    assert torch.equal(merged.get_input_embeddings().weight, before)
    merged.save_pretrained(tmp_path)
    stored = type(merged).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(output(stored, IDS), expected, atol=1e-5, rtol=1e-5)


def test_a_hit_of_one_adapter_leaves_the_others() -> None:
    model = adapted()
    model.add_adapter("two", UoraConfig(r=8, target_modules="all-linear"))
    randomise(model, "two", 7)
    model.set_adapter("two")
    expected = output(model.eval(), IDS)
    hit(model)  # of "default"
    assert torch.equal(output(model, IDS), expected)


def test_wrong_frames_are_refused_and_nothing_stays() -> None:
    model = adapted()
    expected = output(model, IDS)
    foreign = adapted(frame_seed=1).peft_config["default"].frame_fingerprint
    config = UoraConfig(r=8, target_modules="all-linear", frame_fingerprint=foreign)
    with pytest.raises(FingerprintError, match="expected"):
        model.add_adapter("foreign", config)
    assert not [key for key in model.state_dict() if key.endswith(".foreign")]
    assert torch.equal(output(model.eval(), IDS), expected)


def test_an_unsupported_layer_leaves_nothing() -> None:
    base, mixed = llama(), UoraConfig(r=8, target_modules=["q_proj", "rotary_emb"])
    modules = {name: type(module) for name, module in base.named_modules()}
    with pytest.raises(UnsupportedLayerError, match=r"rotary_emb is a LlamaRotaryEmbedding, expected nn\.Linear"):
        get_peft_model(base, mixed)
    assert {name: type(module) for name, module in base.named_modules()} == modules
    model = adapted()
    expected = output(model, IDS)
    with pytest.raises(UnsupportedLayerError):
        model.add_adapter("two", mixed)
    assert not [key for key in model.state_dict() if key.endswith(".two")]
    assert list(model.peft_config) == ["default"]
    assert torch.equal(output(model.eval(), IDS), expected)


def test_a_missing_vector_is_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[next(key for key in tensors if key.endswith("uora_lambda_b"))]
    save_file(tensors, path)
    with pytest.raises(ShapeError, match="lacks 1 tensors"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_bad_values() -> None:
    with pytest.raises(RankError, match="greater than or equal to 1"):
        UoraConfig(r=0)
    with pytest.raises(SpecError, match=r"alpha: found 1\.5"):
        UoraConfig(alpha=1.5)
    with pytest.raises(SpecError, match="give both or neither"):
        UoraConfig(tau_quantile=0.1)
    with pytest.raises(SpecError, match="needs layers_to_transform"):
        UoraConfig(layers_pattern="layers")


def test_configuration_holds_every_setting() -> None:
    spec = UoraSpec(
        r=3, alpha=0.75, tau=1e-3, count_k=2, d_initial=0.2, dropout=0.1, frame_seed=4, targets=("q_proj",),
        init="xavier", reinit_scope="layer", dynamic_alpha=True, tau_quantile=0.1, reinit_interval=5,
    )  # fmt: skip
    assert all(
        getattr(spec, name) != field.default for name, field in UoraSpec.model_fields.items() if name != "method"
    )
    config = UoraConfig.of(spec, target_modules=["q_proj"], frame_cache_dir=None)
    assert config.spec(targets=("q_proj",)) == spec


class _Linears(nn.Module):
    """``count`` layers of one size, without memory (meta device)."""

    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, size, device="meta") for _ in range(count))


# (model, r, trainable parameters): the sum of out + r over adapted layers; GPT-2's fused c_attn as two layers.
COUNTS = [
    ("roberta-base", 8, 18_624),
    ("roberta-base", 16, 18_816),
    ("roberta-base", 64, 19_968),
    ("roberta-large", 8, 49_536),
    ("gpt2-medium", 16, 49_920),
    ("gpt2-large", 16, 93_312),
]


def _shape_of(name: str) -> tuple[nn.Module, list[str]]:
    if name.startswith("gpt2"):
        layers, width = {"gpt2-medium": (24, 1024), "gpt2-large": (36, 1280)}[name]
        return _Linears(2 * layers, width), [f"layers.{i}" for i in range(2 * layers)]
    layers, width, heads = {"roberta-base": (12, 768, 12), "roberta-large": (24, 1024, 16)}[name]
    config = RobertaConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width
    )
    with torch.device("meta"):
        return RobertaModel(config), ["query", "value"]


@pytest.mark.parametrize(("name", "r", "expected"), COUNTS)
def test_parameter_counts(name: str, r: int, expected: int) -> None:
    model, targets = _shape_of(name)
    trainable, _ = get_peft_model(model, UoraConfig(r=r, target_modules=targets)).get_nb_trainable_parameters()
    assert trainable == expected
