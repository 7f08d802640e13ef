"""What targets mean, and what is said of those that mean nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.uora.toys import bert, gpt2, llama, mlp, vit
from uora.errors import RankError, TargetError, UnsupportedLayerError
from uora.memory import check_memory
from uora.methods import attach
from uora.serving.bank import AdapterBank
from uora.spec import METHODS, parse_adapter
from uora.svd import BaseWeights
from uora.targets import find


def ends(found: dict[str, object]) -> set[str]:
    return {name.rpartition(".")[2] for name in found}


def test_all_linear_leaves_the_output_embeddings_and_the_head() -> None:
    assert ends(find(llama(), "all-linear")) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert ends(find(gpt2(), "all-linear")) == {"c_attn", "c_proj", "c_fc"}
    assert set(find(mlp(), "all-linear")) == {"0", "2"}
    assert set(find(mlp(), "all-linear", head=["2"])) == {"0"}


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (llama, {"q_proj", "v_proj"}),
        (gpt2, {"c_attn"}),  # query, key and value in one
        (bert, {"query", "value"}),
        (vit, {"q_proj", "v_proj"}),
    ],
)
def test_query_and_value(build, expected: set[str]) -> None:  # type: ignore[no-untyped-def]
    assert ends(find(build(), "q,v")) == expected


def test_shapes_are_those_of_the_layer_whatever_its_kind() -> None:
    shape = find(gpt2(), ("c_fc",))["transformer.h.0.mlp.c_fc"]
    assert (shape.in_features, shape.out_features) == (32, 128)
    grouped = find(llama(), ("k_proj",))["model.layers.1.self_attn.k_proj"]
    assert (grouped.in_features, grouped.out_features) == (32, 16)


def test_names_are_whole_parts() -> None:
    assert len(find(llama(), ("0.self_attn.q_proj", "down_proj"))) == 3
    with pytest.raises(TargetError):
        find(llama(), ("proj",))


def test_targets_that_name_nothing_are_told_what_there_is() -> None:
    with pytest.raises(TargetError, match=r"'query' names no module.*there are down_proj, gate_proj") as caught:
        find(llama(), ("q_proj", "query"))
    assert caught.value.param == "targets"
    with pytest.raises(TargetError, match=r"'q,v' are not known.*there are 0, 2"):
        find(mlp(), "q,v")


def test_layers_of_another_kind() -> None:
    with pytest.raises(UnsupportedLayerError, match=r"embed_tokens, a Embedding; expected an nn.Linear"):
        find(llama(), ("embed_tokens",))
    with pytest.raises(UnsupportedLayerError, match=r"no nn.Linear or Conv1D.*Conv2d"):
        find(nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4)), "all-linear")


@pytest.mark.parametrize("method", METHODS)
def test_wrapped_layers_keep_their_names(method: str) -> None:
    plain = find(llama(), "all-linear")
    model = llama()
    wrapped = attach(model, parse_adapter({"method": method, "r": 2}), base=BaseWeights.of_model(model))
    assert find(wrapped.get_base_model(), "all-linear") == plain
    banked = llama()
    AdapterBank(banked, base_digest="0")
    assert find(banked, "all-linear") == plain


@pytest.mark.parametrize("method", METHODS)
def test_a_rank_beyond_memory_is_refused(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = list(find(llama(), "all-linear").values())
    spec = parse_adapter({"method": method, "r": 64})
    check_memory(spec, modules, device=torch.device("cpu"))
    monkeypatch.setattr("uora.memory.available_bytes", lambda _device: 2000)
    with pytest.raises(RankError, match=r"Rank 64 .* GiB free. Take a rank of \d+ at most") as caught:
        check_memory(spec, modules, device=torch.device("cpu"))
    assert caught.value.param == "r"
    model = llama()
    with pytest.raises(RankError):
        attach(model, spec, base=BaseWeights.of_model(model))
    assert find(model, "all-linear").keys() == {shape.name for shape in modules}
    assert not any("lora" in name or "lambda" in name for name, _ in model.named_parameters())  # nothing was put on it
