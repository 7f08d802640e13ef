"""What the api asks before it takes in an adapter that was trained elsewhere."""

from __future__ import annotations

from api.completions.engine import WRITING_TASKS
from api.models.engine import BaseDescription, CheckRequest
from uora import targets
from uora.artifact import Manifest
from uora.errors import UoraError
from uora.models import load_skeleton
from worker.engine.checking import check_writer
from worker.engine.classify import half_of
from worker.engine.errors import EngineError
from worker.engine.runner import Runner, Served


def describe(runner: Runner) -> BaseDescription:
    """The base model's linear layers, and the digests that an adapter for it has."""
    linears = targets.linears(load_skeleton(runner.base))
    return BaseDescription(
        base_digest=runner.base.digest,
        chat_template_sha256=runner.template_sha256,
        modules={name: (module.in_features, module.out_features) for name, module in linears.items()},
    )


def check(served: Served, body: CheckRequest) -> None:
    """Make sure that an adapter could answer here, as if it were asked.

    Raises:
        EngineError: it could not.
    """
    manifest = Manifest.model_validate(body.manifest)
    try:
        if isinstance(served, Runner) and manifest.task in WRITING_TASKS:
            check_writer(manifest, served.bank, served.template_sha256, param="file")
        else:
            half_of(served).check(manifest, param="file")
    except UoraError as error:
        raise EngineError(400, error.code, error.message, param="file") from error
