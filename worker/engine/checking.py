"""Whether an adapter can answer on an engine's base model: asked by requests, and before one is made resident."""

from __future__ import annotations

from collections.abc import Collection

from api.completions.engine import WRITING_TASKS
from uora.artifact import Manifest
from uora.serving.bank import AdapterBank
from worker.engine.errors import EngineError


def check_writer(manifest: Manifest, bank: AdapterBank, template_sha256: str | None, *, param: str = "model") -> None:
    """Make sure that an adapter writes text on the bank's base model with its chat template.

    Raises:
        EngineError: it writes no text, or was trained with another template; the request's ``param`` names it.
        UoraError: it does not belong to the base model (`AdapterBank.check`).
    """
    if manifest.task not in WRITING_TASKS:
        raise EngineError(
            400,
            "model_not_supported",
            f"The adapter was trained for {manifest.task} and writes no text; expected {' or '.join(WRITING_TASKS)}.",
            param=param,
        )
    bank.check(manifest)
    if manifest.chat_template_sha256 is not None:
        check_template(manifest, template_sha256, param=param)


def check_classifier(manifest: Manifest, bank: AdapterBank, tasks: Collection[str], *, param: str = "model") -> None:
    """Make sure that an adapter gives classes or numbers on the bank's base model.

    Raises:
        EngineError: it was trained for another task than these, or has no head.
        UoraError: it does not belong to the base model (`AdapterBank.check`).
    """
    if manifest.task not in tasks or not manifest.head:
        raise EngineError(
            400,
            "model_not_supported",
            f"The model was trained for {manifest.task}; this engine classifies for {', '.join(sorted(tasks))}.",
            param=param,
        )
    bank.check(manifest)


def check_template(manifest: Manifest, template_sha256: str | None, *, param: str) -> None:
    """Raises `EngineError` if the conversation would not be written as the adapter has learned it."""
    if manifest.chat_template_sha256 is None:
        raise EngineError(
            400,
            "chat_template_mismatch",
            "The model was trained on prompts and completions without a chat template; use /v1/completions.",
            param=param,
        )
    if template_sha256 is None:
        raise no_template(param)
    if manifest.chat_template_sha256 != template_sha256:
        raise EngineError(
            400,
            "chat_template_mismatch",
            "The adapter was trained with another chat template than the engine's base model has. Serve it with the "
            "template it was trained with.",
            param=param,
        )


def no_template(param: str) -> EngineError:
    """What a conversation is answered with where the base model has no chat template."""
    return EngineError(
        400,
        "no_chat_template",
        "The base model's tokenizer has no chat template, so conversations cannot be written for it. Use "
        "/v1/completions, or a base model with a chat template.",
        param=param,
    )
