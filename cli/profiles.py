"""Which service, and with which key: the environment's, else what ``uora login`` stored."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from platformdirs import user_config_path

from cli.errors import CliError

DEFAULT_PROFILE = "default"
DEFAULT_BASE_URL = "http://127.0.0.1:8000/v1"


@dataclass(frozen=True)
class Profile:
    """A service and a key for it."""

    base_url: str
    api_key: str


def profiles_path() -> Path:
    """The file with all profiles, which only its owner may read: it has keys."""
    return user_config_path("uora") / "profiles.json"


def current_profile(name: str, environment: Mapping[str, str] = os.environ) -> Profile:
    """The profile in use: ``UORA_BASE_URL`` and ``UORA_API_KEY`` win over what is stored.

    Raises:
        CliError: there is no key, or it is stored for another service than the environment's.
    """
    stored = stored_profiles().get(name)
    base_url = normalise(environment.get("UORA_BASE_URL") or (stored.base_url if stored else DEFAULT_BASE_URL))
    if api_key := environment.get("UORA_API_KEY"):
        return Profile(base_url=base_url, api_key=api_key)
    if stored is None:
        option = "" if name == DEFAULT_PROFILE else f" --profile {name}"
        raise CliError(f"No API key: run `uora{option} login`, or set UORA_BASE_URL and UORA_API_KEY.")
    if base_url != stored.base_url:
        raise CliError(
            f"UORA_BASE_URL is {base_url}, and the stored key is one for {stored.base_url}: set UORA_API_KEY too."
        )
    return stored


def normalise(base_url: str) -> str:
    """The URL with the path of the API, which may be left out.

    Raises:
        CliError: it is no URL of HTTP.
    """
    parts = urlsplit(base_url.strip())
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise CliError(f"The base URL is {base_url!r}; expected one like {DEFAULT_BASE_URL}.")
    return parts._replace(path=parts.path.rstrip("/") or "/v1", query="", fragment="").geturl()


def stored_profiles() -> dict[str, Profile]:
    """What is stored, by name.

    Raises:
        CliError: the file is damaged.
    """
    path = profiles_path()
    try:
        content = json.loads(path.read_text())
        return {name: Profile(**fields) for name, fields in content["profiles"].items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CliError(f"{path} is damaged; delete it and run `uora login`.") from error


def store_profile(name: str, profile: Profile) -> Path:
    """Store a profile in the place of an earlier one of its name; the file's path."""
    stored = stored_profiles() | {name: profile}
    path = profiles_path()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _replace(path, {"profiles": {name: asdict(profile) for name, profile in stored.items()}})
    return path


def _replace(path: Path, content: Any) -> None:
    """At once, so that no reader finds half of it; ``mkstemp`` makes files that only their owner may read."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(content, file, indent=2)
        Path(temporary).replace(path)
    except BaseException:
        with suppress(FileNotFoundError):
            Path(temporary).unlink()
        raise
