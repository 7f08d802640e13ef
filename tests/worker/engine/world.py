"""An api with a real engine of the tiny model, and adapters that stock PEFT made."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from openai import OpenAI
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from sqlalchemy.orm import Session, sessionmaker
from transformers import AutoModelForCausalLM

from api.database import make_engine, make_sessions
from api.main import create_app
from api.settings import Settings
from tests.api.support import NO_TLS, RecordingQueue, Tenant, make_tenant, migrate, register_engine, serve
from tests.tiny import make_tiny_llama
from uora.models import fetch, load_tokenizer
from worker.engine.app import create_app as create_engine

PROMPT = "hello there"


@dataclass
class World:
    """An api, an engine, and two projects."""

    url: str
    folder: Path
    tenants: tuple[Tenant, Tenant]
    sessions: sessionmaker[Session]
    settings: Settings

    def client(self, tenant: int = 0) -> OpenAI:
        transport = openai.DefaultHttpxClient(verify=NO_TLS)
        key = self.tenants[tenant].key
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, http_client=transport, max_retries=0, timeout=60)

    def send(self, content: bytes, *, tenant: int = 0, name: str = "adapter.zip", **fields: str) -> dict[str, Any]:
        """Import with the official client."""
        answer = self.client(tenant).post(
            "/models",
            cast_to=httpx.Response,
            body={"base_model": "tiny"} | fields,
            files=[("file", (name, content))],
            options={"headers": {"Content-Type": "multipart/form-data"}},
        )
        made: dict[str, Any] = answer.json()
        return made

    def ask(self, model: str, *, tenant: int = 0) -> str:
        done = self.client(tenant).completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0)
        return done.choices[0].text


@pytest.fixture(scope="package")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("importing")
    settings = Settings(
        _env_file=None,
        home=folder,
        cache_dir=folder / "cache",
        base_models={"tiny": f"path:{make_tiny_llama(folder / 'tiny', max_tokens=256)}"},
        engine_token="token",  # type: ignore[arg-type]
        engine_max_rows=4,
        dtype="float32",
        max_adapter_bytes=1_000_000,
    )
    migrate(settings.database_url)
    sessions = make_sessions(make_engine(settings.database_url))
    with sessions.begin() as session:
        tenants = make_tenant(session, "Acme"), make_tenant(session, "Stranger")
    with serve(create_engine(settings)) as engine_url:
        register_engine(sessions, engine_url)
        with serve(create_app(settings, queue=RecordingQueue())) as url:
            yield World(url, folder, tenants, sessions, settings)


def peft_folder(world: World, config: LoraConfig | VeraConfig, folder: Path) -> str:
    """A strong adapter saved by stock PEFT; what it makes of the prompt."""
    base = fetch("tiny", world.settings.base_models["tiny"], cache_dir=world.settings.cache_dir)
    torch.manual_seed(3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter)
    model.save_pretrained(folder)
    return stock_answer(model, load_tokenizer(base))


def stock_answer(model: PeftModel, tokenizer: Any) -> str:
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        found = model.eval().generate(input_ids=ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    text: str = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def zipped(folder: Path) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in folder.iterdir():
            archive.write(file, f"my-adapter/{file.name}")
    return packed.getvalue()
