"""Base models that tests of the core share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings
from transformers import PreTrainedTokenizerBase

from tests.tiny import make_tiny_llama
from uora.models import LocalModel, fetch, load_tokenizer

# How long one example takes says more about what else runs on the machine than about the code.
settings.register_profile("uora", deadline=None)
settings.load_profile("uora")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    """The tiny Llama as a base model."""
    directory = make_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))
    return fetch("tiny", f"path:{directory}", cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def smollm2() -> LocalModel:
    """The real model, from the cache that the service uses; downloaded (93 MB) if it is not there."""
    cache_dir = Path(os.environ.get("UORA_CACHE_DIR", Path.home() / ".cache" / "uora"))
    name = "SmolLM2-135M-Instruct"
    return fetch(name, f"known:{name}", cache_dir=cache_dir)


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2: LocalModel) -> PreTrainedTokenizerBase:
    """The real model's tokenizer."""
    return load_tokenizer(smollm2)
