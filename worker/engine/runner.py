"""The engine's parts, built once per process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import structlog
import torch
from transformers import PreTrainedTokenizerFast

from api.completions.engine import WRITING_TASKS
from api.database import make_engine, make_read_sessions
from api.engines.models import Load
from api.settings import Settings
from uora.data.templates import template_sha256
from uora.errors import BaseModelError
from uora.models import LocalModel, fetch, load_model, load_tokenizer, pick_dtype, served_tasks
from uora.serving.bank import AdapterBank
from uora.serving.generation import Batcher, check_servable, end_tokens
from uora.serving.grammar import Grammars
from uora.serving.tryout import Tryout
from uora.spec import Task
from uora.svd import BaseWeights
from worker.engine.adapters import AdapterStore
from worker.engine.checking import check_writer
from worker.engine.classifying import ClassifierHalf, Classifying, build_encoder, build_over
from worker.engine.fitting import check_fits
from worker.engine.residency import Residency
from worker.engine.scheduler import Scheduler

log = structlog.get_logger()

#: Of the memory for adapters, where an engine writes text too: a classifier's is as large as another one, and rarer.
_SHARE_OF_CLASSIFIERS = 1 / 8


@dataclass(frozen=True, kw_only=True)
class Served:
    """A loaded base model that is asked for classes and numbers only.

    Attributes:
        base: the base model on this machine.
        store: adapters in the database.
        turn: held by whoever lets the device compute.
        classifying: answers with classes and numbers.
    """

    base: LocalModel
    store: AdapterStore
    turn: threading.Lock
    classifying: Classifying

    def start(self) -> None:
        """Start the threads."""
        self.classifying.start()
        self.classifying.load()

    def stop(self) -> None:
        """Stop them."""
        self.classifying.stop()

    def load(self) -> Load:
        """What the engine is busy with."""
        classes = self.classifying
        return {"running": classes.running, "waiting": classes.waiting, "resident": classes.resident}

    @property
    def resident_bytes(self) -> int:
        """Bytes of the adapters in memory."""
        return self.classifying.resident_bytes


@dataclass(frozen=True, kw_only=True)
class Runner(Served):
    """One that writes text, and loads what classifies when it is asked for it.

    Attributes:
        tokenizer: the base model's tokenizer, with the chat template.
        template_sha256: of the chat template, None where there is none; adapters trained with another are refused.
        context: tokens that a prompt and its answer may have together.
        grammars: what answers can be held to, over the tokenizer's tokens.
        bank: the resident adapters that write text.
        scheduler: runs the batch.
        residency: keeps the bank as the database has it.
    """

    tokenizer: PreTrainedTokenizerFast
    template_sha256: str | None
    context: int
    grammars: Grammars
    bank: AdapterBank
    scheduler: Scheduler
    residency: Residency

    def start(self) -> None:
        """Start the threads."""
        self.classifying.start()
        self.scheduler.start()
        self.residency.start()

    def stop(self) -> None:
        """Stop them."""
        self.residency.stop()
        self.scheduler.stop()
        super().stop()

    def load(self) -> Load:
        """What the engine is busy with, text and classes."""
        classes = super().load()
        return {
            "running": self.scheduler.running + classes["running"],
            "waiting": self.scheduler.waiting + classes["waiting"],
            "resident": len(self.bank) + classes["resident"],
        }

    @property
    def resident_bytes(self) -> int:
        """Bytes of the adapters in memory, of both kinds."""
        return self.bank.bytes + super().resident_bytes


def build_runner(settings: Settings) -> Served:
    """Load the base model and everything around it.

    Raises:
        BaseModelError: the base model is not configured, cannot be had, or has no fast tokenizer.
        SpecError: the model is of a kind that this engine does not serve.
    """
    name = settings.engine_base_model
    if name not in settings.base_models:
        raise BaseModelError(f"Base model {name!r} is not among UORA_BASE_MODELS {sorted(settings.base_models)}.")
    if settings.torch_threads:
        torch.set_num_threads(settings.torch_threads)
    base = fetch(name, settings.base_models[name], cache_dir=settings.cache_dir)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_fits(base, settings, device)
    tasks = served_tasks(base)
    return _text_runner(base, settings, device) if "chat" in tasks else _encoder(base, settings, device, tasks)


def _encoder(base: LocalModel, settings: Settings, device: str, tasks: frozenset[Task]) -> Served:
    half = build_encoder(base, settings, device=device, tasks=tasks, budget=settings.engine_adapter_memory)
    log.info("engine_loaded", base_model=base.name, device=device, tasks=sorted(half.tasks))
    turn, store = threading.Lock(), _store(settings)
    classifying = _classifying(lambda: half, base, settings, store, turn)
    return Served(base=base, store=store, turn=turn, classifying=classifying)


def _store(settings: Settings) -> AdapterStore:
    return AdapterStore(make_read_sessions(make_engine(settings.database_url)))


def _classifying(
    build: Callable[[], ClassifierHalf],
    base: LocalModel,
    settings: Settings,
    store: AdapterStore,
    turn: threading.Lock,
) -> Classifying:
    return Classifying(
        build,
        base_model=base.name,
        store=store,
        turn=turn,
        max_waiting=settings.engine_max_waiting_items,
        max_tokens=settings.engine_max_classify_tokens,
    )


def _text_runner(base: LocalModel, settings: Settings, device: str) -> Runner:
    tokenizer = load_tokenizer(base)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise BaseModelError(f"{base.name}: streaming needs a fast tokenizer, found {type(tokenizer).__name__}.")
    # On a CPU the batch computes with weights in a layout of its own; the mapped originals need not stay in memory.
    model = load_model(base, dtype=pick_dtype(settings.dtype), device=device, copies_in=settings.cache_dir)
    check_servable(model)
    context = min(settings.engine_max_tokens, getattr(model.config, "max_position_embeddings", 2**31))
    tryout = Tryout.of(model, context=context)  # before the bank and the batch change its layers
    parameters = dict(model.named_parameters())  # by their own names, which the bank changes
    turn, store = threading.Lock(), _store(settings)
    for_classifiers = int(settings.engine_adapter_memory * _SHARE_OF_CLASSIFIERS)
    # The exact weights, whatever the engine's precision: adapters stand on the same singular vectors everywhere.
    weights = BaseWeights.of_local(base, "chat", settings.cache_dir)
    budget = settings.engine_adapter_memory - for_classifiers
    bank = AdapterBank(model, base_digest=base.digest, weights=weights, budget=budget)
    batcher = tryout.check(
        lambda: Batcher(
            model,
            tokenizer,
            bank,
            max_rows=settings.engine_max_rows,
            context=context,
            cache_tokens=settings.engine_kv_tokens,
        )
    )
    log.info("engine_loaded", base_model=base.name, dtype=str(model.dtype), device=device, context=context)
    template = template_sha256(tokenizer) if tokenizer.chat_template else None
    scheduler = Scheduler(batcher, bank, turn)
    return Runner(
        base=base,
        tokenizer=tokenizer,
        template_sha256=template,
        context=context,
        grammars=Grammars(tokenizer, model.config.vocab_size, end_tokens(model, tokenizer)),
        bank=bank,
        store=store,
        turn=turn,
        classifying=_classifying(
            lambda: build_over(base, parameters, settings, budget=for_classifiers), base, settings, store, turn
        ),
        scheduler=scheduler,
        residency=Residency(
            bank,
            store,
            base_model=base.name,
            tasks=WRITING_TASKS,
            check=partial(check_writer, bank=bank, template_sha256=template),
            on_corrupted=scheduler.end_holders,
        ),
    )
