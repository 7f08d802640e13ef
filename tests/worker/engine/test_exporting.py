"""Taking models away in the forms that an engine makes: whole models, and LoRAs that stand on the base's weights."""

from __future__ import annotations

import io
import tempfile
import time
import zipfile
from pathlib import Path

import httpx
import openai
import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from api.database import now
from api.models.models import Adapter
from tests.worker.engine.world import PROMPT, World, peft_folder, zipped
from uora.artifact import Provenance, loads
from uora.methods import attach, export_artifact
from uora.models import fetch, load_model, load_tokenizer
from uora.spec import parse_adapter
from uora.svd import BaseWeights
from worker.engine import exporting


@pytest.fixture
def imported(world: World, tmp_path: Path) -> tuple[str, str]:
    """A model that stock PEFT made, and what it makes of the prompt."""
    expected = peft_folder(world, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]), tmp_path / "made")
    return world.send(zipped(tmp_path / "made"))["id"], expected


def unpack(content: bytes, folder: Path) -> Path:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        archive.extractall(folder)
    return folder


def answer(world: World, model: PreTrainedModel | PeftModel) -> str:
    tokenizer = load_tokenizer(fetch("tiny", world.settings.base_models["tiny"], cache_dir=world.settings.cache_dir))
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        found = model.eval().generate(input_ids=ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))


def download(world: World, model: str, **query: str) -> httpx.Response:
    return world.client().get(f"/models/{model}/adapter", cast_to=httpx.Response, options={"params": query})


def test_a_merged_model_answers_without_an_adapter(
    world: World,
    imported: tuple[str, str],
    tmp_path: Path,
) -> None:
    name, expected = imported
    got = download(world, name, format="merged")
    assert got.headers["content-type"] == "application/zip"
    folder = unpack(got.content, tmp_path / "merged")
    assert answer(world, AutoModelForCausalLM.from_pretrained(folder)) == expected != world.ask("tiny")
    assert (folder / "tokenizer.json").exists()
    again = download(world, name, format="merged")
    assert (again.content, again.headers["etag"]) == (got.content, got.headers["etag"])
    half = download(world, name, format="merged", dtype="bfloat16")
    assert half.headers["etag"] != got.headers["etag"]
    halved = AutoModelForCausalLM.from_pretrained(unpack(half.content, tmp_path / "half"))
    assert halved.dtype == torch.bfloat16


def test_the_lora_of_an_osora_adapter_stands_on_the_weights(world: World, tmp_path: Path) -> None:
    base = fetch("tiny", world.settings.base_models["tiny"], cache_dir=world.settings.cache_dir)
    weights = BaseWeights.of_local(base, "chat", world.settings.cache_dir)
    spec = parse_adapter({"method": "osora", "r": 4, "targets": "q,v"})
    tuned = attach(load_model(base, dtype=torch.float32, device="cpu"), spec, base=weights)
    generator = torch.Generator().manual_seed(5)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator)
    expected = answer(world, tuned)
    content = export_artifact(
        tuned,
        spec,
        base=weights,
        provenance=Provenance(base_model="tiny", base_digest=base.digest, data_sha256="d" * 64),
    )
    manifest = loads(content).manifest
    name = "ft:tiny:acme:osora:12345678"
    with world.sessions.begin() as session:
        session.add(
            Adapter(
                id=name,
                project_id=world.tenants[0].project_id,
                base_model="tiny",
                digest=manifest.digest,
                manifest=manifest.model_dump(mode="json"),
                artifact=content,
                created_at=now(),
            )
        )
    folder = unpack(download(world, name, format="lora").content, tmp_path / "lora")
    plain = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32)
    assert answer(world, PeftModel.from_pretrained(plain, folder)) == expected != world.ask("tiny")


def test_one_export_at_a_time(world: World, imported: tuple[str, str]) -> None:
    with exporting._ONE_AT_A_TIME, pytest.raises(openai.InternalServerError) as caught:
        download(world, imported[0], format="merged")
    assert (caught.value.status_code, caught.value.code) == (503, "engine_busy")
    assert caught.value.response.headers["retry-after"] == "10"
    assert download(world, imported[0], format="merged").status_code == 200


def test_a_client_that_leaves_leaves_nothing(
    world: World,
    imported: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(exporting, "_PIECE", 256)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    headers = {"Authorization": f"Bearer {world.tenants[0].key}"}
    address = f"{world.url}/v1/models/{imported[0]}/adapter?format=merged"
    with httpx.stream("GET", address, headers=headers, timeout=60) as going:
        next(going.iter_raw(64))
        assert list(tmp_path.glob("uora-export-*"))
    deadline = time.monotonic() + 30
    while list(tmp_path.glob("uora-export-*")) or exporting._ONE_AT_A_TIME.locked():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_model_that_is_gone_is_not_found(world: World, imported: tuple[str, str]) -> None:
    world.client().models.delete(imported[0])
    with pytest.raises(openai.NotFoundError):
        download(world, imported[0], format="merged")
