"""All settings of all processes, read once from the environment (prefix ``UORA_``)."""

from __future__ import annotations

import socket
from datetime import timedelta
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from uora.estimate import Prices

SMOLLM2 = "SmolLM2-135M-Instruct"


class DatabaseSettings(BaseSettings):
    """Where the database is. Migrations need no more, and no secret."""

    model_config = SettingsConfigDict(env_prefix="UORA_", env_file=".env", extra="ignore")

    #: Where the embedded default keeps its database, files and queue.
    home: Path = Path(".uora")
    #: SQLAlchemy URL; empty means SQLite below ``home``.
    database_url: str = ""

    @model_validator(mode="after")
    def _fill_database_url(self) -> Self:
        self.home = self.home.resolve()
        self.database_url = self.database_url or f"sqlite:///{self.home / 'uora.db'}"
        return self


class Settings(DatabaseSettings):
    """Settings shared by api, trainer, sweeper and engine.

    Everything has a default but the engine token; with the defaults, SQLite and files below ``home`` are used
    and no server has to be installed.
    """

    #: Celery broker URL; empty means kombu's filesystem transport below ``home``.
    broker_url: str = ""
    #: Uploaded files; a relative path lies below ``home``. Trainers must see the same folder.
    storage_dir: Path = Path("files")
    #: Converted base models and frames. Everything in it can be made again.
    cache_dir: Path = Field(default_factory=lambda: Path.home() / ".cache" / "uora")

    #: Base models that can be tuned and served: name -> source (see ``uora.models``).
    base_models: dict[str, str] = Field(default_factory=lambda: {SMOLLM2: f"known:{SMOLLM2}"})
    #: The one base model that this process's engine serves; else the first of ``base_models``. ``make up`` starts
    #: engines for this one alone if it is set, else for all.
    engine_base_model: str = Field(default_factory=lambda known: next(iter(known.get("base_models", ())), ""))
    #: Where the api reaches this process's engine; ``{hostname}`` stands for the machine's or the container's name.
    #: ``make up`` counts its port up for further engines.
    engine_advertise_url: str = "http://127.0.0.1:8001"
    #: Engines that ``make up`` starts for each base model.
    engine_replicas: int = Field(default=1, ge=1)
    #: An engine tells that it is there, and its load, this often; without that for ``engine_ttl`` it counts as dead.
    engine_heartbeat_interval: timedelta = timedelta(seconds=1)
    engine_ttl: timedelta = timedelta(seconds=5)
    #: Shared secret between api and engine. It has no default: both refuse to start without it.
    engine_token: SecretStr
    #: How long an answer may take; a request can ask for less (``x-request-timeout-seconds``).
    engine_timeout: timedelta = timedelta(seconds=120)
    #: Rows decoded together, and tokens (prompt and answer) that one row may have.
    engine_max_rows: int = Field(default=32, ge=1)
    engine_max_tokens: int = Field(default=2048, ge=16)
    #: Items of one classification; items that may wait, and tokens of a pass over items of any requests.
    engine_max_classify_items: int = Field(default=256, ge=1)
    engine_max_waiting_items: int = Field(default=2048, ge=1)
    engine_max_classify_tokens: int = Field(default=4096, ge=16)
    #: Tokens whose keys and values an engine holds at once; 0 takes a quarter of what all rows could have.
    engine_kv_tokens: int = Field(default=0, ge=0)
    #: Bytes for the adapters that an engine holds; where it writes text, an eighth of them is for classifiers.
    engine_adapter_memory: int = Field(default=1024**3, ge=0)

    #: "auto" takes bfloat16 where the processor has it, else float32.
    dtype: str = Field(default="auto", pattern="^(auto|bfloat16|float32)$")
    #: torch threads of an engine or of each process of a training; 0 leaves torch's own choice, shared among those.
    torch_threads: int = Field(default=0, ge=0)
    #: Whether a trainer that has had a job keeps a process for the next one, with torch and transformers imported: it
    #: begins seconds earlier, for some 400 MB of memory meanwhile.
    spare_trainer: bool = True
    #: Jobs that a trainer takes at once where they can share their passes (``uora.spec.cotraining_key``); 1 trains each
    #: by itself.
    cotrain_jobs: int = Field(default=8, ge=1)

    #: Processes that a trainer trains a job in, sharing each batch: one per GPU of its machine. With several, jobs are
    #: trained one by one.
    training_processes: int = Field(default=1, ge=1)

    #: The operator's key for Weights & Biases, where jobs may ask to be followed; ``offline`` writes runs to
    #: ``home/wandb``, from where ``wandb sync`` sends them.
    wandb_api_key: SecretStr | None = None
    wandb_mode: Literal["online", "offline"] = "online"
    wandb_base_url: str = "https://api.wandb.ai"

    max_upload_bytes: int = Field(default=512 * 1024 * 1024, ge=1)
    #: A file that is uploaded in parts, and each of its parts.
    max_large_upload_bytes: int = Field(default=8 * 1024**3, ge=1)
    max_part_bytes: int = Field(default=64 * 1024 * 1024, ge=1)
    #: Quotas of projects that have none of their own; 0 is no limit (docs/usage.md).
    quota_jobs_running: int = Field(default=0, ge=0)
    quota_jobs_queued: int = Field(default=0, ge=0)
    quota_bytes_stored: int = Field(default=0, ge=0)
    quota_requests_per_minute: int = Field(default=0, ge=0)
    quota_tokens_per_minute: int = Field(default=0, ge=0)
    #: What training costs, for estimates, in whatever currency: per second, and per thousand tokens of all epochs.
    price_per_second: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    price_per_thousand_tokens: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    #: An adapter that is imported, as a file and as it is stored; 1 GB is the most that a database takes.
    max_adapter_bytes: int = Field(default=256 * 1024 * 1024, ge=1, le=900_000_000)
    #: Every other request body.
    max_json_bytes: int = Field(default=4 * 1024 * 1024, ge=1024)
    #: An adapter that comes with a completion request; in base64 it takes a third more of ``max_json_bytes``.
    max_inline_adapter_bytes: int = Field(default=2 * 1024 * 1024, ge=0)
    #: Whether webhooks may be sent to private, loopback and link-local addresses, and over http.
    webhook_allow_private: bool = False
    #: A trainer's claim on a job, renewed every ``heartbeat_interval``; when it runs out, the job is free.
    lease_ttl: timedelta = timedelta(seconds=30)
    heartbeat_interval: timedelta = timedelta(seconds=2)
    #: How often the sweeper rings again for jobs that nobody works on.
    sweep_interval: timedelta = timedelta(seconds=15)
    #: From SIGTERM to SIGKILL when a training child is stopped for good.
    stop_grace: timedelta = timedelta(seconds=2)
    #: The same for a pause or a shutdown: time to end the step and to write the state that the job goes on from.
    pause_grace: timedelta = timedelta(seconds=60)
    #: From the moment that a server is told to stop, and its ``/readyz`` says so, until it takes no more connections:
    #: longer than whoever shares out the requests looks for that.
    drain_delay: timedelta = timedelta(0)
    #: Trainers lost in a row, none of which kept a later state, before a job fails as ``trainer_lost``.
    max_attempts: int = Field(default=3, ge=1)

    #: The least that is logged, and how: ``auto`` is for people on a terminal and JSON elsewhere.
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["auto", "json", "console"] = "auto"
    #: What reads ``/metrics`` sends as its bearer token; without one, metrics are for the machine itself.
    metrics_token: SecretStr | None = None
    #: Where a trainer, sweeper or webhooks process, which has no port else, answers to ``/metrics``; 0 is nowhere.
    #: ``make up`` counts the port up, in this order.
    metrics_host: str = "127.0.0.1"
    metrics_port: int = Field(default=0, ge=0, le=65535)

    @model_validator(mode="after")
    def _fill_paths(self) -> Self:
        self.cache_dir = self.cache_dir.expanduser().resolve()
        self.storage_dir = (self.home / self.storage_dir).resolve()
        self.broker_url = self.broker_url or "filesystem://"
        self.engine_advertise_url = self.engine_advertise_url.replace("{hostname}", socket.gethostname()).rstrip("/")
        self.engine_kv_tokens = self.engine_kv_tokens or max(
            self.engine_max_tokens, self.engine_max_rows * self.engine_max_tokens // 4
        )
        return self

    @property
    def prices(self) -> Prices:
        """What training costs."""
        return Prices(self.price_per_second, self.price_per_thousand_tokens)

    @property
    def queue_dir(self) -> Path:
        """Folder of the filesystem broker."""
        return self.home / "queue"
