"""An engine that does not fit says so before it loads anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from api.settings import Settings
from tests.tiny import make_tiny_bert, make_tiny_vit
from uora.models import LocalModel, fetch, load_model
from worker import memory
from worker.engine.fitting import DoesNotFitError, check_fits, estimate
from worker.engine.runner import build_runner


@pytest.fixture
def limited(settings: Settings, tiny_model: Path) -> Settings:
    """Settings of an engine for a tiny model."""
    values = {"base_models": {"tiny": f"path:{tiny_model}"}, "engine_kv_tokens": 1000, "engine_adapter_memory": 5000}
    return settings.model_copy(update={**values, "engine_base_model": "tiny"})


@pytest.fixture
def base(limited: Settings) -> LocalModel:
    return fetch("tiny", limited.base_models["tiny"], cache_dir=limited.cache_dir)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_the_estimate_is_what_the_model_has(limited: Settings, base: LocalModel, dtype: torch.dtype, size: int) -> None:
    model = load_model(base, dtype=dtype, device="cpu")
    with torch.inference_mode():
        layers = model(input_ids=torch.zeros(1, 10, dtype=torch.long), use_cache=True).past_key_values.layers
    per_token = sum(layer.keys.numel() + layer.values.numel() for layer in layers) // 10

    need = estimate(base, limited, dtype)

    assert need.weights == size * sum(parameter.numel() for parameter in model.parameters())
    assert need.kv == size * 1000 * per_token
    assert (need.adapters, need.total) == (5000, need.weights + need.kv + 5000)


@pytest.mark.parametrize("make", [make_tiny_bert, make_tiny_vit])
def test_an_encoder_keeps_no_keys(limited: Settings, tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "encoder")
    encoder = fetch("encoder", f"path:{tmp_path / 'encoder'}", cache_dir=limited.cache_dir)
    assert estimate(encoder, limited, torch.float32).kv == 0


def test_a_model_that_fits_passes(limited: Settings, base: LocalModel) -> None:
    check_fits(base, limited, "cpu")


def test_one_that_does_not_is_told_what_to_do(limited: Settings) -> None:
    limited.engine_adapter_memory = 2 * psutil.virtual_memory().total
    with pytest.raises(DoesNotFitError) as caught:
        build_runner(limited)
    for part in ("'tiny' needs", "GiB of adapters", f"UORA_ENGINE_ADAPTER_MEMORY={limited.engine_adapter_memory}",
                 "UORA_ENGINE_KV_TOKENS=1000", "Found", "available on cpu", "UORA_DTYPE=bfloat16"):  # fmt: skip
        assert part in caught.value.message


def test_a_container_has_its_limit(tmp_path: Path) -> None:
    machine = memory.available_bytes(tmp_path / "none")
    for name, content in (
        ("memory.max", "1000"),
        ("memory.current", "700"),
        ("memory.stat", "anon 5\ninactive_file 50\n"),
    ):
        (tmp_path / name).write_text(content)
    assert memory.available_bytes(tmp_path) == 350 < machine
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes(tmp_path) > 350


def test_keys_and_values_have_room_for_a_quarter_of_all_rows() -> None:
    assert Settings(_env_file=None, engine_token="x").engine_kv_tokens == 32 * 2048 // 4
    one_row = Settings(_env_file=None, engine_token="x", engine_max_rows=1)
    assert one_row.engine_kv_tokens == one_row.engine_max_tokens
