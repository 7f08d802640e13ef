"""Base models that tests of the core share."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings
from transformers import PreTrainedTokenizerBase

from tests.tiny import make_tiny_llama
from tests.uora.task_cases import TrainCase, train_cases
from uora.models import LocalModel, fetch, load_tokenizer

# How long one example takes says more about what else runs on the machine than about the code.
settings.register_profile("uora", deadline=None)
settings.load_profile("uora")


BaseOf = Callable[[Callable[[Path], Path]], LocalModel]


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> BaseOf:
    """Base models by their makers in ``tests.tiny``, each made once."""

    @cache
    def made(make: Callable[[Path], Path]) -> LocalModel:
        return fetch(
            "tiny", f"path:{make(tmp_path_factory.mktemp('base'))}", cache_dir=tmp_path_factory.mktemp("cache")
        )

    return made


@pytest.fixture(scope="session")
def tiny_base(base_of: BaseOf) -> LocalModel:
    """The tiny Llama as a base model."""
    return base_of(make_tiny_llama)


@pytest.fixture(scope="session")
def trained(base_of: BaseOf) -> TrainCase:
    """Finished runs of every task with any method, each made once."""
    return train_cases(base_of)


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
