"""The engine's parts, built once per process."""

from __future__ import annotations

from dataclasses import dataclass

import structlog
import torch
from transformers import PreTrainedTokenizerFast

from api.database import make_engine, make_sessions
from api.settings import Settings
from uora.data.templates import template_sha256
from uora.errors import BaseModelError
from uora.models import LocalModel, fetch, load_model, load_tokenizer, pick_dtype
from uora.serving.bank import AdapterBank
from uora.serving.generation import Batcher, check_servable, end_tokens
from uora.serving.grammar import Grammars
from uora.svd import BaseWeights
from worker.engine.adapters import AdapterStore
from worker.engine.fitting import check_fits
from worker.engine.scheduler import Scheduler

log = structlog.get_logger()


@dataclass(frozen=True)
class Runner:
    """A loaded base model with its bank and scheduler.

    Attributes:
        base: the base model on this machine.
        tokenizer: its tokenizer, with the chat template.
        template_sha256: of the chat template; adapters trained with another one are refused.
        context: tokens that a prompt and its answer may have together.
        grammars: what answers can be held to, over the tokenizer's tokens.
        bank: the resident adapters; only the scheduler's thread may change it.
        store: adapters in the database.
        scheduler: runs the batch.
    """

    base: LocalModel
    tokenizer: PreTrainedTokenizerFast
    template_sha256: str
    context: int
    grammars: Grammars
    bank: AdapterBank
    store: AdapterStore
    scheduler: Scheduler


def build_runner(settings: Settings) -> Runner:
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
    tokenizer = load_tokenizer(base)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise BaseModelError(f"{name}: streaming needs a fast tokenizer, found {type(tokenizer).__name__}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_fits(base, settings, device)
    model = load_model(base, dtype=pick_dtype(settings.dtype), device=device)
    check_servable(model)
    # The exact weights, whatever the engine's precision: adapters stand on the same singular vectors everywhere.
    weights = BaseWeights.of_local(base, "chat", settings.cache_dir)
    bank = AdapterBank(model, base_digest=base.digest, weights=weights, budget=settings.engine_adapter_memory)
    context = min(settings.engine_max_tokens, getattr(model.config, "max_position_embeddings", 2**31))
    batcher = Batcher(
        model,
        tokenizer,
        bank,
        max_rows=settings.engine_max_rows,
        context=context,
        cache_tokens=settings.engine_kv_tokens,
    )
    log.info("engine_loaded", base_model=name, dtype=str(model.dtype), device=device, context=context)
    return Runner(
        base=base,
        tokenizer=tokenizer,
        template_sha256=template_sha256(tokenizer),
        context=context,
        grammars=Grammars(tokenizer, model.config.vocab_size, end_tokens(model, tokenizer)),
        bank=bank,
        store=AdapterStore(make_sessions(make_engine(settings.database_url))),
        scheduler=Scheduler(batcher, bank),
    )
