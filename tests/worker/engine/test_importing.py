"""Importing through the api into a real engine: what was trained elsewhere answers as it did there."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from peft import LoraConfig, VeraConfig

from api.models.models import Adapter
from tests.api.support import ROOT
from tests.worker.engine.world import World, peft_folder, zipped
from uora.artifact import Artifact, dumps, loads


def tarred(folder: Path, mode: str) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:  # type: ignore[call-overload]
        archive.add(folder, "my-adapter")
    return packed.getvalue()


PACKERS: list[Callable[[Path], bytes]] = [zipped, lambda f: tarred(f, "w"), lambda f: tarred(f, "w:gz")]


@pytest.mark.parametrize("pack", PACKERS, ids=["zip", "tar", "tar.gz"])
@pytest.mark.parametrize("method", ["lora", "vera"])
def test_a_peft_folder_answers_as_with_stock_peft(
    world: World, tmp_path: Path, method: str, pack: Callable[[Path], bytes]
) -> None:
    config = {
        "lora": LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"]),
        "vera": VeraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj"]),
    }[method]
    expected = peft_folder(world, config, tmp_path)
    made = world.send(pack(tmp_path), suffix="mine")
    assert made["id"].startswith(f"ft:tiny:{world.tenants[0].slug}:mine:")
    assert (made["owned_by"], made["parent"], made["root"]) == (world.tenants[0].slug, "tiny", "tiny")
    assert world.ask(made["id"]) == expected != world.ask("tiny")
    with pytest.raises(openai.NotFoundError):
        world.ask(made["id"], tenant=1)
    assert world.client().models.delete(made["id"]).deleted


def test_a_download_is_imported_elsewhere(world: World, tmp_path: Path) -> None:
    """As it is stored, by another project; and its LoRA."""
    expected = peft_folder(world, LoraConfig(r=4, target_modules=["q_proj"]), tmp_path)
    name = world.send(zipped(tmp_path))["id"]
    for form in ("uora", "lora"):
        content = world.client().get(f"/models/{name}/adapter?format={form}", cast_to=httpx.Response).content
        made = world.send(content, tenant=1, name="adapter")
        assert world.ask(made["id"], tenant=1) == expected


def test_the_scripts_of_the_page(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    share, load = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "models.md").read_text(), flags=re.DOTALL)
    expected = peft_folder(world, LoraConfig(r=4, target_modules=["q_proj"]), tmp_path)
    (tmp_path / "adapter.zip").write_bytes(zipped(tmp_path))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"client": world.client(), "base_model": "tiny"}
    exec(load, names)  # noqa: S102 - the page's own script
    name = capsys.readouterr().out.strip()
    assert world.ask(name) == expected
    guest = world.tenants[1].project_id
    exec(share, names | {"model": name, "other_project": guest})  # noqa: S102 - the page's own script
    assert guest in capsys.readouterr().out


def test_the_command_of_the_page(world: World, tmp_path: Path) -> None:
    (command,) = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "models.md").read_text(), flags=re.DOTALL)
    expected = peft_folder(world, LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "my-adapter")
    client = world.client()
    root = str(client.base_url).rstrip("/").removesuffix("/v1")
    script = command.replace("SmolLM2-135M-Instruct", "tiny").replace("curl", "curl -sS --fail-with-body")
    done = subprocess.run(
        ["/bin/sh", "-ec", script],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "URL": root, "KEY": client.api_key},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert world.ask(json.loads(done.stdout)["id"]) == expected


def stored(world: World, tmp_path: Path) -> Artifact:
    peft_folder(world, LoraConfig(r=4, target_modules=["q_proj"]), tmp_path)
    name = world.send(zipped(tmp_path))["id"]
    with world.sessions() as session:
        return loads(session.query(Adapter).filter_by(id=name).one().artifact)


def test_what_does_not_belong_to_the_base_model_is_refused(world: World, tmp_path: Path) -> None:
    good = stored(world, tmp_path)
    shape = good.manifest.modules[0]
    elsewhere = (shape.model_copy(update={"name": "model.layers.0.z_proj"}), *good.manifest.modules[1:])
    for changes, code in (
        ({"base_digest": "0" * 64}, "base_model_mismatch"),
        ({"chat_template_sha256": "0" * 64}, "chat_template_mismatch"),
        ({"modules": elsewhere}, "adapter_shape_mismatch"),
        ({"task": "classification"}, "model_not_supported"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            world.send(dumps(Artifact(good.manifest.model_copy(update=changes), good.tensors)))
        assert (caught.value.code, caught.value.param) == (code, "file")


def packed(**files: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name.replace("_dot_", "."), data)
    return content.getvalue()


CONFIG = json.dumps({"peft_type": "LORA", "r": 4}).encode()


@pytest.mark.parametrize(
    ("content", "status", "code", "said"),
    [
        (b"", 400, "adapter_format", "a zip or tar of a PEFT folder"),
        (b"\x80\x04pickle", 400, "adapter_format", "a zip or tar of a PEFT folder"),
        (b"PK\x03\x04broken", 400, "invalid_archive", "cannot be read"),
        (b"\x1f\x8bbroken", 400, "invalid_archive", "cannot be read"),
        (packed(adapter_config_dot_json=CONFIG), 400, "invalid_archive", "each once"),
        (
            packed(adapter_config_dot_json=CONFIG, adapter_model_dot_bin=b"\x80"),
            400,
            "invalid_archive",
            "a pickle and is never read",
        ),
        (
            packed(adapter_config_dot_json=CONFIG, adapter_model_dot_safetensors=b"\0" * 1_000_001),
            413,
            "request_too_large",
            "more than 1,000,000 bytes",
        ),
        (b"x" * 1_000_001, 413, "request_too_large", "more than 1,000,000 bytes"),
        (b"x" * 2_000_000, 413, "request_too_large", "more than"),
    ],
    # Archives hold the time, and tests are named alike in all processes.
    ids=["empty", "pickle", "zip", "gzip", "half", "pickled", "unpacked", "large", "larger"],
)
def test_what_is_no_adapter_is_refused(world: World, content: bytes, status: int, code: str, said: str) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        world.send(content)
    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert said in caught.value.message


def test_a_gzip_that_unpacks_to_too_much_is_not_unpacked(world: World) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        info = tarfile.TarInfo("zeros")
        info.size = 50_000_000
        archive.addfile(info, _Zeros(info.size))
    assert len(content.getvalue()) < 1_000_000
    with pytest.raises(openai.APIStatusError) as caught:
        world.send(content.getvalue())
    assert caught.value.status_code == 413


class _Zeros(io.RawIOBase):
    def __init__(self, size: int) -> None:
        self._left = size

    def read(self, size: int = -1) -> bytes:
        given = min(size, self._left)
        self._left -= given
        return bytes(given)


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"base_model": "other"}, 404, "base_model"),
        ({"suffix": "no spaces"}, 400, "suffix"),
        ({"task": "classification"}, 400, "task"),
        ({"colour": "red"}, 400, "colour"),
    ],
)
def test_fields_that_cannot_be_used(world: World, fields: dict[str, str], status: int, param: str) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        world.send(b"x", **fields)
    assert (caught.value.status_code, caught.value.param) == (status, param)
