"""``/v1/classify``"""

from __future__ import annotations

from fastapi import Request, Response

from api.classifications import engine, service
from api.classifications.schemas import Classification, ClassificationCreate
from api.completions.responses import unless_disconnected
from api.dependencies import ResourcesDep
from api.quotas.dependencies import AdmittedCallerDep
from api.routing import Router
from api.usage.models import Operation

router = Router(prefix="/classify", tags=["inference"])


@router.post("", response_model=Classification)
async def create_classification(
    request: Request, response: Response, body: ClassificationCreate, caller: AdmittedCallerDep, resources: ResourcesDep
) -> Classification:
    """Give each text, pair of texts or image its class or number, by one of the project's models."""
    settings = resources.settings
    served = await service.resolve(resources.read_sessions, caller, name=body.model, settings=settings)
    wanted = service.to_engine(body, served, max_items=settings.engine_max_classify_items)
    answer = await unless_disconnected(request, engine.classify(resources.engine, wanted))
    resources.usage.add(
        caller,
        served.name,
        Operation.CLASSIFICATION,
        requests=1,
        input_tokens=answer.prompt_tokens,
        items=len(wanted.items),
    )
    await resources.limits.spend(caller, answer.prompt_tokens)
    response.headers["x-uora-provenance"] = answer.provenance.header()
    return service.to_client(answer, model=served.name)
